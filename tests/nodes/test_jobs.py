"""An evaluation and a training run over several nodes, each of which loses one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.evaluation.config import EvalConfig
from services.evaluation.results import read_results
from services.evaluation.run import RESULTS, Plan, evaluate
from services.training.config import TrainConfig
from services.training.folders import latest
from services.training.metrics import LINES, read_lines
from services.training.train import fit
from tests.services.cluster import wait_for
from tests.services.evaluation.conftest import values as evaluation_values
from tests.services.training.conftest import text_file
from tests.services.training.conftest import values as training_values

__all__ = ["evaluation_values", "text_file", "training_values"]

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_an_evaluation_has_every_result_though_a_node_dies(nodes, evaluation_values, tmp_path):
    settings = {"workers": {"count": 2, "threads": 1, "cpus": 2}}  # one on each node
    config = EvalConfig.model_validate(evaluation_values(tmp_path, **settings))

    def on_result(done: int, total: int, arm: str) -> None:
        if done == 2:
            nodes.kill(1)

    folder = evaluate(config, on_result=on_result)
    results = read_results(folder / RESULTS)
    assert set(results) == set(Plan.of(config).keys)
    assert not [result for result in results.values() if "error" in result and "died" in str(result["error"])]


@pytest.mark.timeout(600)
def test_a_training_run_goes_on_though_a_node_dies(nodes, training_values, tmp_path: Path):
    workers = {"count": 2, "threads": 1, "cpus": 2, "failures": 3}
    config = TrainConfig.model_validate(training_values(tmp_path, steps=12, workers=workers, checkpoints={"every": 2}))

    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(fit, config)
        wait_for(lambda: latest(config.folder), lambda: run.done() and repr(run.exception()))
        nodes.kill(0)  # here, since nodes can't be started by another thread
        outcome = run.result()
    assert outcome["step"] == 12
    steps = [line["step"] for line in read_lines(config.folder / LINES) if "loss" in line]
    assert steps == list(range(1, 13))
