"""A run as jobs of a Ray cluster of two nodes, one of which vanishes: begun, stopped, resumed."""

from __future__ import annotations

import contextlib
import os
import re
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
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from segcore.errors import NotFound, Unavailable
from services.cli import main
from services.training.config import TrainConfig
from services.training.folders import latest
from services.training.jobs import Jobs
from services.training.metrics import LINES, read_lines
from tests.services.training.conftest import Alone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent.parent.parent
STEPS, EVERY = 48, 8


class Cluster(NamedTuple):
    """Two nodes of one CPU each. address: of the dashboard. client: for ray://. second: the one that isn't the head."""

    address: str
    client: str
    second: subprocess.Popen[bytes]


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run_file(values, runs) -> Callable[..., Path]:
    def write(name: str, **more: object) -> Path:
        file = runs / f"{name}.yaml"
        changes = {"name": name, "steps": STEPS, "checkpoints": {"every": EVERY}}
        file.write_text(yaml.safe_dump(values(runs, **changes | more)))
        return file

    return write


def curve(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in read_lines(run / LINES)]


def numbers(run: Path, key: str) -> list[float]:
    return [line[key] for line in curve(run) if key in line]


def step(run: Path) -> int:
    return max((line["step"] for line in read_lines(run / LINES)), default=0)


@pytest.fixture(scope="module")
def finished(cluster, run_file, runs) -> Path:
    """A run of as many workers as there is room for: begun by two, robbed of a node, stopped, resumed."""
    file, run = str(run_file("run", workers={"count": [1, 2], "threads": 1})), runs / "run"
    jobs, there = Jobs(cluster.address), ["--address", cluster.address]

    assert main(["train", file, *there, "--detach"]) == 0
    first = jobs.find("run").submission_id

    def failed() -> str | None:
        ended = jobs._client.get_job_status(first).is_terminal()
        return jobs._client.get_job_logs(first) if ended else None

    wait_for(lambda: latest(run) and step(run) % EVERY, failed)
    lost_at = step(run)
    end(cluster.second)
    wait_for(lambda: "with 1 workers" in jobs._client.get_job_logs(first), failed)
    wait_for(lambda: step(run) > lost_at and step(run) % EVERY, failed)
    assert re.findall(r"from step (\d+) on with (\d) workers", jobs._client.get_job_logs(first))[0] == ("0", "2")

    assert main(["train", "stop", "run", *there]) == 0
    stopped_at = step(run)
    assert lost_at < stopped_at < STEPS
    assert main(["train", "resume", "run", *there]) == 0
    second = jobs.find("run").submission_id
    assert second != first
    assert re.search(r"from step ([1-9]\d*) on with 1 workers", jobs._client.get_job_logs(second))
    return run


def test_a_run_that_lost_a_node_and_was_stopped_has_the_curve_of_one_worker_unbroken(finished, run_file, runs):
    Alone(TrainConfig.read(run_file("alone"))).run.train()
    for key, count in (("loss", STEPS), ("eval_loss", 1 + STEPS // EVERY)):
        assert len(numbers(finished, key)) == count
        assert numbers(finished, key) == pytest.approx(numbers(runs / "alone", key), rel=1e-9)


def test_the_best_checkpoints_are_kept_and_one_is_exported(finished):
    scores = {line["step"]: line["eval_loss"] for line in curve(finished) if "eval_loss" in line and line["step"]}
    best = sorted(scores, key=scores.__getitem__)[:2]
    kept = {path.name for path in finished.glob("checkpoint-*")}
    wanted = {f"checkpoint-{step:07d}" for step in {*best, STEPS}}
    # One that appeared as its worker was lost, before Ray heard of it, stays too.
    assert wanted <= kept
    assert len(kept - wanted) <= 2
    exported = AutoModelForCausalLM.from_pretrained(finished / "export", dtype=torch.float64)
    weights = load_file(finished / f"checkpoint-{best[0]:07d}" / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in exported.named_parameters())


def test_jobs_are_listed_by_the_address_that_is_named(cluster, finished, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{free_port()}")
    assert main(["train", "list", "--address", cluster.client]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"run-\d+.*STOPPED", listed)
    assert re.search(r"run-\d+.*SUCCEEDED", listed)
    assert os.environ["RAY_ADDRESS"]
    with pytest.raises(NotFound, match="no training job or run 'nobody'"):
        Jobs(cluster.address).find("nobody")


def test_where_nobody_takes_jobs_is_said(run_file, capsys):
    with pytest.raises(Unavailable, match="--local"):
        Jobs(f"http://127.0.0.1:{free_port()}")
    assert main(["train", str(run_file("x")), "--address", f"http://127.0.0.1:{free_port()}"]) == 1
    assert "no Ray cluster takes jobs at" in capsys.readouterr().err
