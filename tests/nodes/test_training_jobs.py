"""Training as jobs of a cluster that `ray start` made of two nodes: the example, and a run that a third node joins."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from services.cli import main
from services.training.config import TrainConfig
from services.training.folders import latest
from services.training.jobs import Jobs
from services.training.metrics import LINES, read_lines
from tests.services.cluster import ROOT, Cluster, open_cluster, wait_for
from tests.services.training.conftest import text_file, values

__all__ = ["text_file", "values"]

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

EXAMPLE = ROOT / "examples" / "train-smollm2.yaml"


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    """Nodes with room for one worker of two CPUs each."""
    with open_cluster(cpus=2) as made:
        yield made


def example_in(folder: Path) -> Path:
    """The example, but for where its run is kept."""
    file = folder / EXAMPLE.name
    file.write_text(EXAMPLE.read_text().replace("storage: ../runs", f"storage: {folder}"))
    return file


def numbers(run: Path, key: str) -> list[float]:
    return [line[key] for line in read_lines(run / LINES) if key in line]


@pytest.mark.timeout(1800)
def test_the_example_learns_as_a_job(two_nodes, tmp_path):
    file = example_in(tmp_path)
    run = TrainConfig.read(file).folder
    assert main(["train", str(file), "--address", two_nodes.address]) == 0
    loss, answered = numbers(run, "eval_loss"), numbers(run, "eval_accuracy")
    assert loss[-1] < 0.8 * loss[0]
    assert answered[-1] >= answered[0] + 0.2
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "export" / "model.safetensors").exists()


@pytest.mark.timeout(900)
def test_a_run_takes_in_a_node_that_joins(two_nodes, values, tmp_path):
    workers = {"count": [1, 3], "threads": 1, "cpus": 2}
    config = values(tmp_path, name="grows", steps=100_000, workers=workers, checkpoints={"every": 50}, evaluation=None)
    file, run = tmp_path / "grows.yaml", tmp_path / "grows"
    file.write_text(yaml.safe_dump(config))
    there, jobs = ["--address", two_nodes.address], Jobs(two_nodes.address)
    assert main(["train", str(file), *there, "--detach"]) == 0
    job = jobs.find("grows").submission_id

    def begun() -> list[tuple[str, str]]:
        # Nodes of one machine see each other's logs: each of them tells each line.
        return [*dict.fromkeys(re.findall(r"from step (\d+) on with (\d) workers", jobs._client.get_job_logs(job)))]

    def ended() -> str | None:
        return jobs._client.get_job_logs(job) if jobs._client.get_job_status(job).is_terminal() else None

    wait_for(lambda: latest(run), ended)
    assert begun() == [("0", "2")]
    two_nodes.join()
    wait_for(lambda: len(begun()) > 1, ended)  # Ray looks for nodes once a minute
    (step, count) = begun()[1]
    assert count == "3"
    assert int(step) > 0
    assert int(step) % 50 == 0
    wait_for(lambda: numbers(run, "step")[-1] > int(step), ended)
    assert main(["train", "stop", "grows", *there]) == 0
    assert numbers(run, "step") == list(range(1, len(numbers(run, "step")) + 1))
