"""A run as jobs of a Ray cluster of two nodes, one of which vanishes: begun, stopped, resumed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

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
from tests.services.cluster import end, free_port, wait_for
from tests.services.training.conftest import Alone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, EVERY = 48, 8


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
        assert numbers(finished, key) == pytest.approx(numbers(runs / "alone", key), rel=1e-7)


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
    with pytest.raises(NotFound, match="no job or run 'nobody'"):
        Jobs(cluster.address).find("nobody")


def test_where_nobody_takes_jobs_is_said(run_file, capsys):
    with pytest.raises(Unavailable, match="--local"):
        Jobs(f"http://127.0.0.1:{free_port()}")
    assert main(["train", str(run_file("x")), "--address", f"http://127.0.0.1:{free_port()}"]) == 1
    assert "no Ray cluster takes jobs at" in capsys.readouterr().err
