"""Processes that a command starts."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from typing import Any

import psutil

# What is stopped may end by itself for so long.
GRACE_S = 5


def end(process: subprocess.Popen[Any]) -> None:
    """End a process with all that it has started: workers that outlive it would hold the device."""
    own = psutil.Process(process.pid)
    family = [own, *own.children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    for member in psutil.wait_procs(family, GRACE_S)[1]:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
