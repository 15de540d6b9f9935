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
from typing import NamedTuple

import psutil

ROOT = Path(__file__).parents[2]


class Cluster(NamedTuple):
    """Two nodes of one CPU each. address: of the dashboard. client: for ray://. second: the one that isn't the head."""

    address: str
    client: str
    second: subprocess.Popen[bytes]


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@contextlib.contextmanager
def open_cluster() -> Iterator[Cluster]:
    """A cluster of our own, whose nodes are ended by their process ids."""
    folder, port, dashboard, client = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")), *(free_port() for _ in "123")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # whose `python` jobs run
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_worker_niceness": "0",
        "RAY_raylet_start_wait_time_s": "150",
        # For as long Ray waits for the workers of a node that it does not yet know to be gone.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
        "PYTHONDONTWRITEBYTECODE": "",  # dozens of processes import the same packages
    }
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1"]
    ray.append("--object-store-memory=100000000")
    head = [
        *ray, "--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    nodes = []
    with open(folder / "nodes.log", "w") as log:
        try:
            nodes.append(subprocess.Popen(head, env=environment, stdout=log, stderr=subprocess.STDOUT))
            started = lambda: (folder / "nodes.log").read_text().count("Ray runtime started")  # noqa: E731
            dead = lambda: any(n.poll() is not None for n in nodes) and (folder / "nodes.log").read_text()  # noqa: E731
            wait_for(lambda: started() == 1, dead)
            node = [*ray, f"--address=127.0.0.1:{port}", f"--dashboard-agent-listen-port={free_port()}"]
            nodes.append(subprocess.Popen(node, env=environment, stdout=log, stderr=subprocess.STDOUT))
            wait_for(lambda: started() == 2, dead)
            yield Cluster(f"http://127.0.0.1:{dashboard}", f"ray://127.0.0.1:{client}", nodes[1])
        finally:
            for process in reversed(nodes):
                end(process)
    shutil.rmtree(folder, ignore_errors=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a node at once, with everything that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
        for each in (process, *started):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
    process.wait()


def wait_for(happened: Callable[[], object], failed: Callable[[], str | None] = lambda: None) -> None:
    """failed: says why it won't."""
    while not happened():
        assert not (why := failed()), why
        time.sleep(0.1)
