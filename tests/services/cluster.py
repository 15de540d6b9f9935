"""A Ray cluster of two nodes, for jobs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """The dashboard of a cluster of our own, whose nodes are ended by their process ids."""
    folder, port, dashboard = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")), free_port(), free_port()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # whose `python` jobs run
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_worker_niceness": "0",
    }
    ray = [
        str(Path(sys.executable).parent / "ray"),
        "start",
        "--block",
        "--num-cpus=1",
        "--object-store-memory=100000000",
    ]
    head = [
        *ray, "--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}",
        f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    nodes = []
    with open(folder / "nodes.log", "w") as log:
        try:
            nodes.append(subprocess.Popen(head, env=environment, stdout=log, stderr=subprocess.STDOUT))
            wait_for(lambda: "Ray runtime started" in (folder / "nodes.log").read_text())
            node = [*ray, f"--address=127.0.0.1:{port}", f"--dashboard-agent-listen-port={free_port()}"]
            nodes.append(subprocess.Popen(node, env=environment, stdout=log, stderr=subprocess.STDOUT))
            wait_for(lambda: (folder / "nodes.log").read_text().count("Ray runtime started") == 2)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            for process in reversed(nodes):
                end(process)
    shutil.rmtree(folder, ignore_errors=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a node, and what it started if it doesn't do so itself."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for left in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()


def wait_for(happened: Callable[[], object], seconds: float = 200) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.05)
