"""A run as jobs of a Ray cluster of two nodes, one of which vanishes: begun, stopped, resumed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from ray.util.state import list_actors
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

STEPS, EVERY = 10, 2

# In the place of W&B: holds a run at the step that a file in its folder says.
HOLDING = """
import time
from pathlib import Path

class Run:
    def __init__(self, folder):
        self._hold = Path(folder) / "hold"
    def log(self, metrics, step):
        while step >= int(self._hold.read_text()):
            time.sleep(0.05)
    def finish(self):
        pass

def init(dir, **settings):
    return Run(dir)
"""


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


def nodes_of_workers(address: str) -> int:
    """How many nodes the workers of the run are on that runs now."""
    actors = list_actors(address, filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
    return len({actor.node_id for actor in actors})


@pytest.fixture(scope="module")
def holding(cluster, runs) -> Iterator[Callable[[int], object]]:
    """Has runs stand still at a step, however quick the machine is: so something can be done to them there."""
    (cluster.modules / "wandb.py").write_text(HOLDING)
    (runs / "run").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(cluster.modules)

        def hold(step: int) -> None:
            (runs / "next").write_text(str(step))
            (runs / "next").rename(runs / "run" / "hold")

        yield hold


@pytest.fixture(scope="module")
def finished(cluster, holding, run_file, runs) -> Path:
    """A run of as many workers as there is room for: begun by two, robbed of a node, stopped, resumed."""
    elastic = {"workers": {"count": [1, 2], "threads": 1}, "metrics": {"trackers": ["wandb"]}}
    file, run = str(run_file("run", **elastic)), runs / "run"
    jobs, there = Jobs(cluster.address), ["--address", cluster.address]

    holding(5)
    assert main(["train", file, *there, "--detach"]) == 0
    first = jobs.find("run").submission_id
    log = lambda job: jobs._client.get_job_logs(job)  # noqa: E731
    failed = lambda: jobs._client.get_job_status(first).is_terminal() and log(first)  # noqa: E731

    wait_for(lambda: step(run) == 5 and latest(run) == run / "checkpoint-0000004", failed)
    assert nodes_of_workers(cluster.address) == 2
    assert main(["train", "resume", file, *there]) == 1, "two jobs would write in one folder"
    end(cluster.second)
    holding(7)
    wait_for(lambda: step(run) == 7 and latest(run) == run / "checkpoint-0000006", failed)
    wait_for(lambda: "with 1 workers" in log(first), failed)
    begun = re.findall(r"from step (\d+) on with (\d) workers", log(first))
    assert (begun[0], begun[-1]) == (("0", "2"), ("4", "1"))

    assert main(["train", "stop", "run", *there]) == 0
    assert step(run) == 7
    holding(STEPS + 1)
    assert main(["train", "resume", "run", *there]) == 0
    second = jobs.find("run").submission_id
    assert second != first
    assert re.findall(r"from step (\d+) on with (\d) workers", log(second)) == [("6", "1")]
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
