"""What a job's process does around the workers: refusals, errors, Ray's list. Ray Train itself is for test_jobs."""

from __future__ import annotations

import signal
import sys
from types import SimpleNamespace

import pytest
import ray.train.torch
import torch

from segcore.errors import ConfigError
from services.cli import main
from services.training import train
from services.training.config import TrainConfig
from services.training.folders import STATE, latest
from services.training.train import SNAPSHOT, check_start, fit
from tests.services.training.conftest import Alone


class Trainer:
    """Ray's, with one worker in this process that is never started anew."""

    started = 0
    checkpoints = None  # what was asked of them
    best = None

    def __init__(self, loop, *, train_loop_config, run_config, **ignored) -> None:
        self._loop, self._given = loop, train_loop_config
        Trainer.checkpoints = run_config.checkpoint_config

    def fit(self):
        Trainer.started += 1
        return SimpleNamespace(
            return_value=self._loop(self._given), get_best_checkpoint=lambda *how: Trainer.best(*how)
        )


@pytest.fixture
def here(monkeypatch):
    """Runs on `Trainer`."""
    Trainer.started, Trainer.best = 0, lambda *_: None
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(train, "_Reporter", lambda: lambda metrics, folder, name: folder and train.publish(folder))


def test_a_run_is_exported_with_its_picture(here, written):
    config = TrainConfig.read(written(steps=2))
    outcome = fit(config)
    assert outcome["step"] == 2
    assert outcome["checkpoint"] == latest(config.folder).name
    exported = {path.name for path in (config.folder / "export").iterdir()}
    assert "model.safetensors" in exported
    assert STATE not in exported
    assert (config.folder / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize("scored", [True, False])
def test_the_best_checkpoints_are_kept_and_the_best_is_exported(here, written, monkeypatch, scored):
    """By the evaluation's loss, of which less is better; without evaluation the latest."""
    file = written(steps=2, checkpoints={"every": 1, "keep": 1}, **({} if scored else {"evaluation": None}))
    config = TrainConfig.read(file)
    first = config.folder / "checkpoint-0000001"
    monkeypatch.setattr(
        Trainer, "best", lambda *how: SimpleNamespace(path=first) if how == ("eval_loss", "min") else None
    )
    outcome = fit(config)
    asked = Trainer.checkpoints
    assert asked.num_to_keep == 1
    assert asked.checkpoint_score_attribute == ("eval_loss" if scored else None)
    assert asked.checkpoint_score_order == "min"
    assert outcome["checkpoint"] == (first.name if scored else "checkpoint-0000002")
    exported = (config.folder / "export" / "model.safetensors").read_bytes()
    assert exported == (config.folder / outcome["checkpoint"] / "model.safetensors").read_bytes()


def test_what_a_worker_refuses_ends_the_run_at_once(here, written):
    """As its result: of an exception Ray would start workers anew."""
    with pytest.raises(ConfigError, match=r"of its device, which has 0\.00 GiB"):
        fit(TrainConfig.read(written(device_bytes=1000)))
    assert Trainer.started == 1


def test_a_run_is_neither_begun_twice_nor_resumed_from_nothing(written, capsys):
    file = str(written(steps=2))
    assert main(["train", "resume", file, "--local"]) == 1
    assert "has no checkpoint to go on from" in capsys.readouterr().err
    Alone(TrainConfig.read(written(steps=2))).run.train()
    assert main(["train", file, "--local"]) == 1
    assert "resume the run, or give it another name" in capsys.readouterr().err
    check_start(TrainConfig.read(written(steps=2)), resume=True)


def test_a_job_that_is_stopped_is_interrupted(written, monkeypatch, tmp_path):
    """For then Ray Train gives back what an elastic run has reserved."""
    (tmp_path / "config.json").write_text(TrainConfig.read(written()).to_json())
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "config.json")])
    monkeypatch.setattr(train, "_connect", lambda config, local: None)
    monkeypatch.setattr(train, "fit", lambda config: signal.raise_signal(signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # What runs in the background may have begun with interrupts ignored; Ray Train has a handler of its own.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train.main()
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ('{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint-0000002"}]}', True),
        ('{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint-0000004"}]}', False),
        ('{"checkpoint_resu', False),
        ("[]", False),
    ],
    ids=["whole", "of what was deleted", "cut short", "another's"],
)
def test_rays_list_is_put_aside_if_it_would_refuse_the_run(tmp_path, text, stays):
    (tmp_path / "checkpoint-0000002").mkdir()
    (tmp_path / SNAPSHOT).write_text(text)
    train.forget_damaged_list(tmp_path)
    assert (tmp_path / SNAPSHOT).exists() is stays
    assert len(list(tmp_path.iterdir())) == 2
