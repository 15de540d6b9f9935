"""Runs without Ray: the same checkpoints and export, and no import of it."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest
from safetensors.torch import load_file

from segcore.errors import ConfigError
from services.training import alone, train
from services.training.alone import fit_alone, ranked
from services.training.config import TrainConfig
from services.training.folders import Progress, checkpoints, latest
from services.training.metrics import LINES, read_lines
from tests.services.cluster import end, wait_for
from tests.services.training.conftest import Alone


def test_a_run_without_ray_is_that_of_any_worker(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # to import it would raise
    monkeypatch.setitem(sys.modules, "ray.train", None)
    config = TrainConfig.read(written())
    outcome = fit_alone(config)
    other = TrainConfig.read(written(name="other"))
    Alone(other).run.train()
    assert outcome["step"] == 6
    ours, theirs = (load_file(latest(c.folder) / "model.safetensors") for c in (config, other))
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert outcome["export"] == str(config.folder / "export")


@pytest.mark.parametrize(("keep", "stay"), [(1, [2, 6]), (2, [2, 3, 6])])
def test_the_best_checkpoints_and_the_latest_are_kept(written, monkeypatch, keep, stay):
    # Of six checkpoints the second is the best and the third the next.
    told = iter([9.0, 5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    monkeypatch.setattr("services.training.worker.Run.evaluate", lambda self: {"eval_loss": next(told)})
    config = TrainConfig.read(written(checkpoints={"every": 1, "keep": keep}))
    outcome = fit_alone(config)
    steps = [Progress.read(path).step for path in checkpoints(config.folder)]
    assert steps == stay
    assert outcome["checkpoint"] == ranked(config.folder)[0].name == "checkpoint-0000002"


def test_without_an_evaluation_the_latest_are_kept(written):
    config = TrainConfig.read(written(checkpoints={"every": 1, "keep": 2}, evaluation=None))
    fit_alone(config)
    assert [Progress.read(path).step for path in checkpoints(config.folder)] == [5, 6]


@pytest.mark.slow
def test_several_workers_are_processes_with_the_curve_of_one(written):
    one, two = (TrainConfig.read(written(name=f"of-{n}", workers={"count": n, "threads": 1})) for n in (1, 2))
    fit_alone(one)
    assert fit_alone(two)["step"] == 6
    ours, theirs = ([line["loss"] for line in read_lines(c.folder / LINES) if "loss" in line] for c in (one, two))
    assert ours == pytest.approx(theirs, abs=1e-9)


@pytest.mark.slow
def test_what_workers_refuse_is_raised_here(written):
    with pytest.raises(ConfigError, match=r"of its device, which has 0\.00 GiB"):
        fit_alone(TrainConfig.read(written(device_bytes=1000, workers={"count": 2, "threads": 1})))


def refuse(config, rank):
    raise ConfigError("the second worker's item doesn't fit")


def only_the_second_refuses(rank, *settings):
    """In a worker's process."""
    if rank == 1:
        alone.work = refuse
    alone.join(rank, *settings)


@pytest.mark.slow
def test_what_one_worker_alone_refuses_is_told_and_not_that_it_left(written, monkeypatch):
    monkeypatch.setattr(alone, "join", only_the_second_refuses)
    with pytest.raises(ConfigError, match="the second worker's item"):
        fit_alone(TrainConfig.read(written(workers={"count": 2, "threads": 1})))


@pytest.mark.slow
def test_a_command_that_is_ended_ends_its_run(written):
    file = written(steps=10**6, evaluation=None, workers={"count": 2, "threads": 1})
    command = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "train", str(file), "--no-ray"], stdout=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: "step 2" in command.stdout.readline())
        run = psutil.Process(command.pid).children(recursive=True)
        assert len(run) > 2
        command.terminate()
        command.communicate(timeout=30)
        assert not psutil.wait_procs(run, 30)[1]
    finally:
        end(command)


def test_the_command_says_how_it_ended(written, monkeypatch, capsys):
    file = written(steps=1)
    written_json = file.with_suffix(".json")
    written_json.write_text(TrainConfig.read(file).to_json())
    monkeypatch.setattr(sys, "argv", ["train", str(written_json), "--no-ray"])
    assert train.main() == 0
    assert '"done": true' in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_was_lost_goes_on_when_it_is_begun_again(written, monkeypatch):
    """As a RayJob does it, whose cluster may die at any time: the same words, `--retry` among them."""
    file = written(steps=12, evaluation=None)
    config, written_json = TrainConfig.read(file), file.with_suffix(".json")
    written_json.write_text(config.to_json())
    words = [str(written_json), "--retry", "--no-ray"]
    with subprocess.Popen([sys.executable, "-m", train.__name__, *words], stdout=subprocess.PIPE) as first:
        while latest(config.folder) is None:
            assert first.poll() is None, first.communicate()
        first.kill()
    assert 0 < Progress.read(latest(config.folder)).step < 12
    monkeypatch.setattr(sys, "argv", ["train", *words])
    assert train.main() == 0
    assert [line["step"] for line in read_lines(config.folder / LINES) if "loss" in line] == list(range(1, 13))
