"""A run by one worker in this process, without Ray: the same worker, checkpoints and export.

For one machine where Ray isn't, or isn't worth its start. What Ray would do besides is left out: a worker that dies
isn't started anew, but `segcore train resume` goes on from the newest checkpoint.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import torch

from segcore.errors import ConfigError
from services.training.config import TrainConfig
from services.training.folders import Progress, checkpoints, latest, publish
from services.training.parallel import Workers
from services.training.train import Outcome, exported
from services.training.worker import Run


def fit_alone(config: TrainConfig) -> Outcome:
    """As `train.fit`. Raises SegcoreError."""
    if config.workers.least > 1:
        raise ConfigError(f"workers.count={config.workers.count}: without Ray there is one worker")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    torch.set_num_threads(config.workers.threads or max(1, int(config.workers.cpus)))
    device = torch.device("cuda" if config.workers.gpus else "cpu")
    run = Run(config, Workers(), device, partial(appear, config))
    step = run.train().step
    return {"step": step, "metrics": run.metrics, **exported(config, next(iter(ranked(config.folder)), None))}


def appear(config: TrainConfig, metrics: dict[str, float], folder: Path | None, name: str) -> None:
    """Let a checkpoint appear, and delete those beyond what is kept: the best, as with Ray, and always the latest."""
    if folder is not None:
        publish(folder)
        for path in ranked(config.folder)[config.checkpoints.keep :]:
            if path != latest(config.folder):
                shutil.rmtree(path)


def ranked(run: Path) -> list[Path]:
    """A run's checkpoints by their loss in evaluation; without one, and among equals, the later ones first."""
    newest_first = checkpoints(run)[::-1]
    return sorted(newest_first, key=lambda path: Progress.read(path).metrics.get("eval_loss", 0.0))
