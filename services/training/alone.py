"""A run without Ray, on this machine: the same workers, checkpoints and export.

One worker is this process; several are processes of its own, which share the GPUs there are. What Ray would do besides
is left out: a worker that dies ends the run, and `segcore train resume` goes on from the newest checkpoint.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import spawn

from segcore.errors import SegcoreError
from services.training.config import TrainConfig
from services.training.folders import Progress, checkpoints, latest, publish
from services.training.parallel import Workers
from services.training.train import Outcome, exported
from services.training.worker import Run


def fit_alone(config: TrainConfig) -> Outcome:
    """As `train.fit`, with the least number of workers. Raises SegcoreError."""
    world = config.workers.least
    if world == 1:
        work(config, 0)
    else:
        with tempfile.TemporaryDirectory() as folder:
            errors: Any = mp.get_context("spawn").SimpleQueue()
            try:
                spawn(join, (config.to_json(), world, f"file://{folder}/meeting", errors), nprocs=world)
            except Exception:
                if errors.empty():
                    raise
            if not errors.empty():
                raise errors.get()
    found = ranked(config.folder)
    progress = Progress.read(latest(config.folder) or found[0])
    return {"step": progress.step, "metrics": progress.metrics, **exported(config, found[0])}


def work(config: TrainConfig, rank: int) -> None:
    """A worker's run."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    torch.set_num_threads(config.workers.threads or max(1, int(config.workers.cpus)))
    device = torch.device("cuda", rank % torch.cuda.device_count()) if config.workers.gpus else torch.device("cpu")
    Run(config, Workers(), device, partial(appear, config)).train()


def join(rank: int, settings: str, world: int, meeting: str, errors: Any) -> None:
    """A worker's process. What fails on one alone, as an item that can't be made, the others see as a lost peer."""
    config = TrainConfig.model_validate_json(settings)
    own = config.workers.gpus and world <= torch.cuda.device_count()  # NCCL won't have two workers on one GPU
    backend = "cpu:gloo,cuda:nccl" if own else "cpu:gloo,cuda:gloo"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world)
    try:
        work(config, rank)
    except SegcoreError as error:
        errors.put(error)
    finally:
        dist.destroy_process_group()


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
