"""Runs as jobs of a Ray cluster of two nodes: one unbroken; one stopped, resumed, and robbed of a worker."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from segcore.errors import NotFound, Unavailable
from services.cli import main
from services.training.checkpoint import TENSORS, latest
from services.training.config import TrainConfig
from services.training.jobs import Jobs
from services.training.metrics import LINES, read_lines
from tests.services.cluster import free_port, wait_for
from tests.services.training.conftest import Alone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 16


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run_file(values, runs) -> Callable[..., Path]:
    def write(name: str, **more: object) -> Path:
        file = runs / f"{name}.yaml"
        workers = {"count": 2, "threads": 1}
        changes = {"name": name, "steps": STEPS, "workers": workers, "checkpoints": {"every": 4}}
        file.write_text(yaml.safe_dump(values(runs, **changes | more)))
        return file

    return write


@pytest.fixture(scope="module")
def unbroken(address, run_file, runs) -> Path:
    assert main(["train", str(run_file("unbroken")), "--address", address]) == 0
    return runs / "unbroken"


def curve(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in read_lines(run / LINES)]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in curve(run) if "loss" in line]


def test_two_workers_have_the_curve_of_one(unbroken, run_file, runs):
    alone = TrainConfig.read(run_file("alone"))
    Alone(alone).run.train()
    assert len(losses(unbroken)) == STEPS
    assert losses(unbroken) == pytest.approx(losses(runs / "alone"), rel=1e-9)
    evaluations = [
        [line["eval_loss"] for line in curve(run) if "eval_loss" in line] for run in (unbroken, runs / "alone")
    ]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-9)


def test_the_best_checkpoints_are_kept_and_one_is_exported(unbroken, run_file):
    kept = sorted(path.name for path in unbroken.glob("checkpoint-*"))
    scores = {line["step"]: line["eval_loss"] for line in curve(unbroken) if "eval_loss" in line and line["step"]}
    best = sorted(scores, key=scores.__getitem__)[:2]
    assert kept == [f"checkpoint-{step:07d}" for step in sorted({*best, STEPS})]
    exported = AutoModelForCausalLM.from_pretrained(unbroken / "export", dtype=torch.float64)
    weights = load_file(unbroken / f"checkpoint-{best[0]:07d}" / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in exported.named_parameters())


def test_a_run_that_was_stopped_resumed_and_lost_a_worker_is_an_unbroken_one(address, run_file, runs, unbroken, capsys):
    jobs, run, step = (
        Jobs(address),
        runs / "broken",
        lambda: max((line["step"] for line in read_lines(run / LINES)), default=0),
    )
    file = str(run_file("broken"))

    assert main(["train", file, "--address", address, "--detach"]) == 0
    wait_for(lambda: latest(run) and step() % 4)
    assert main(["train", "stop", "broken", "--address", address]) == 0
    first, stopped_at = jobs.find("broken").submission_id, step()
    assert stopped_at < STEPS
    assert main(["train", "list", "--address", address]) == 0
    assert re.search(rf"{first}.*STOPPED", capsys.readouterr().out)

    assert main(["train", "resume", "broken", "--address", address, "--detach"]) == 0
    second = jobs.find("broken").submission_id
    assert second != first
    wait_for(lambda: step() > stopped_at)
    log = jobs._client.get_job_logs(second)
    workers = set(re.findall(r"RayTrainWorker pid=(\d+)", log))
    os.kill(int(re.findall(r"RayTrainWorker pid=(\d+).*segcore-run", log)[0]), signal.SIGKILL)
    assert main(["train", "follow", second, "--address", address]) == 0

    log = jobs._client.get_job_logs(second)
    assert len(set(re.findall(r"RayTrainWorker pid=(\d+)", log)) - workers) >= 2, "the workers were started anew"
    assert curve(run) == curve(unbroken)
    ours, theirs = (latest(folder) for folder in (run, unbroken))
    assert ours.name == theirs.name
    for name in ("model.safetensors", TENSORS):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_a_run_is_neither_begun_twice_nor_resumed_from_nothing(address, unbroken, run_file, capsys):
    assert main(["train", str(run_file("unbroken")), "--address", address]) == 1
    assert "resume the run, or give it another name" in capsys.readouterr().out
    with pytest.raises(NotFound, match="no job or run 'nobody'"):
        Jobs(address).find("nobody")


def test_what_a_worker_refuses_ends_the_run_at_once(address, run_file, runs, capsys):
    assert main(["train", str(run_file("large", device_bytes=1000)), "--address", address]) == 1
    assert "of its device, which has 0.00 GiB" in capsys.readouterr().out
    log = Jobs(address)._client.get_job_logs(str(Jobs(address).find("large").submission_id))
    assert len(set(re.findall(r"RayTrainWorker pid=(\d+)", log))) <= 2, "no worker was started anew"


def test_where_nobody_takes_jobs_is_said(run_file, capsys):
    with pytest.raises(Unavailable, match="--local"):
        Jobs(f"http://127.0.0.1:{free_port()}")
    assert main(["train", str(run_file("x")), "--address", f"http://127.0.0.1:{free_port()}"]) == 1
    assert "no Ray cluster takes jobs at" in capsys.readouterr().err
