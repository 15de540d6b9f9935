"""Engine replicas killed while they upload, prefill, refresh and decode: no session is lost, no token differs."""

from __future__ import annotations

import os
import random
import signal

import psutil
import pytest

from segcore.sampling import SamplingParams

pytestmark = pytest.mark.e2e

DOCUMENT = "".join(f"Entry {i}: the café at № {i * 7919 % 10007} opens at {i % 24} o'clock.\n" for i in range(120))
QUESTION = "When does the café open?"
GREEDY = SamplingParams(max_tokens=200, stop=("ÿ",))
SAMPLED = SamplingParams(max_tokens=200, stop=("ÿ",), temperature=1.0, seed=5)


def engine_processes() -> list[psutil.Process]:
    """The engine tier's replicas, by the name that Ray gives their processes."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "EngineDeployment" in " ".join(process.cmdline()) or "ServeReplica:segcore:engine" in process.name():
                found.append(process)
        except psutil.Error:
            continue
    return [p for p in found if "ServeReplica:segcore:engine" in " ".join(p.cmdline())] or found


def kill_an_engine() -> int:
    victims = engine_processes()
    assert victims, "no engine replica runs"
    victim = random.choice(victims)
    os.kill(victim.pid, signal.SIGKILL)
    return victim.pid
