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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).parents[2]


class Cluster(NamedTuple):
    """Two nodes. address: of the dashboard. client: for ray://. second: the one that isn't the head. modules: a folder
    of Python modules for jobs to import. join: adds a node, with some options of `ray start`."""

    address: str
    client: str
    second: subprocess.Popen[bytes]
    modules: Path
    join: Callable[..., subprocess.Popen[bytes]]


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@contextlib.contextmanager
def open_cluster(cpus: int = 1, head: Sequence[str] = (), second: Sequence[str] = ()) -> Iterator[Cluster]:
    """A cluster of our own, whose nodes are ended by their process ids. cpus: of each node. head, second: what else
    `ray start` is told."""
    folder, port, dashboard, client = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")), *(free_port() for _ in "123")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # whose `python` jobs run
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder / 'modules'}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_worker_niceness": "0",
        "RAY_raylet_start_wait_time_s": "150",
        # A node that is gone doesn't answer at all, and is given up after five checks; one that is slow has ten seconds
        # for each.
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_health_check_period_ms": "300",
        # For as long Ray waits for the workers of a node that it does not yet know to be gone; then it tries again.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
        "PYTHONDONTWRITEBYTECODE": "",  # dozens of processes import the same packages
    }
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", f"--num-cpus={cpus}"]
    ray.append("--object-store-memory=100000000")
    nodes: list[subprocess.Popen[bytes]] = []
    (folder / "modules").mkdir()
    with open(folder / "nodes.log", "w") as log:

        def start(*options: str) -> subprocess.Popen[bytes]:
            command = [*ray, *options, f"--dashboard-agent-listen-port={free_port()}"]
            nodes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            said = (folder / "nodes.log").read_text
            wait_for(
                lambda: said().count("Ray runtime started") == len(nodes),
                lambda: said() if nodes[-1].poll() is not None else None,
            )
            return nodes[-1]

        def join(*options: str) -> subprocess.Popen[bytes]:
            return start(f"--address=127.0.0.1:{port}", *options)

        try:
            start(
                "--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}",
                f"--ray-client-server-port={client}", *head,
            )  # fmt: skip
            joined = join(*second)
            address = f"http://127.0.0.1:{dashboard}"
            yield Cluster(address, f"ray://127.0.0.1:{client}", joined, folder / "modules", join)
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
