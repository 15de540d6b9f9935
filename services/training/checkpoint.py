"""Checkpoints: folders that transformers loads, with what training needs to go on beside the weights.

    config.json, model.safetensors, tokenizer ...   the model; of an adapter, PEFT's files
    segcore.json                                    the policy to serve with
    training.safetensors, training.json             fp32 masters and the optimizer's state; `Progress`

A checkpoint is written under a hidden name where it is to stay, and appears whole. Learning rates follow from the step,
and so does every worker's random state (`worker.py`). Nothing here is a pickle.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from segcore.adapter import SELECTORS_FILE
from segcore.config import MIB, SegmentConfig
from segcore.errors import ConfigError, StorageFull
from segcore.presets import write_card
from segcore.weights import LoadedModel
from services.training.parallel import Optimizer, like, whole

STATE, TENSORS = "training.json", "training.safetensors"
# Left on the disk for what others write there: logs, Ray's own list of checkpoints.
HEADROOM = 64 * MIB


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, and what it may not differ in when it goes on.

    step: steps taken. data: position in the data. data_digest: hash of the data set. digests: of the configuration,
    part by part. metrics: of the last step and evaluation.
    """

    step: int
    data: dict[str, Any]
    data_digest: str
    digests: dict[str, str]
    metrics: dict[str, float]

    @classmethod
    def read(cls, folder: Path) -> Progress:
        """Of a checkpoint. Raises ConfigError."""
        try:
            return cls(**json.loads((folder / STATE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{folder} isn't a checkpoint of a training run: {error}") from error

    def check(self, digests: Mapping[str, str], data_digest: str) -> None:
        """Raise ConfigError if a run of another configuration or data set would go on from here."""
        if changed := sorted(name for name, digest in digests.items() if self.digests.get(name) != digest):
            raise ConfigError(
                f"the run stands at step {self.step} with another {', '.join(changed)}; give the run another name, or"
                " undo the change"
            )
        if self.data_digest != data_digest:
            raise ConfigError(
                f"the data set has changed since step {self.step} of this run (hash {self.data_digest} then,"
                f" {data_digest} now); give the run another name, or restore the data"
            )


def checkpoint_name(step: int) -> str:
    return f"checkpoint-{step:07d}"


def latest(run: Path) -> Path | None:
    """The newest checkpoint in a run's folder. It is whole: `publish` renames it when it is."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return max(found, default=None)


def save_weights(folder: Path, model: LoadedModel, segment: SegmentConfig) -> None:
    """Write a model as transformers does, its selectors' maps, and the policy to serve it with."""
    model.lm.model.save_pretrained(folder)
    if model.lm.query_maps is not None:
        model.lm.query_maps.write(folder / SELECTORS_FILE)
    model.tokenizer.tokenizer.save_pretrained(folder)
    write_card(folder, segment)


def save_training(folder: Path, tensors: dict[str, Tensor], progress: Progress) -> None:
    """Write what training needs beside the weights. tensors: of `optimizer_tensors`."""
    save_file(tensors, folder / TENSORS)
    (folder / STATE).write_text(json.dumps(dataclasses.asdict(progress), indent=1) + "\n")


@contextmanager
def unfinished(run: Path, name: str) -> Iterator[Path]:
    """A folder to write a checkpoint to, for `publish`. It is gone if what is done inside fails.

    Raises StorageFull if it leaves too little room for others.
    """
    folder = run / f".{name}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        if (free := shutil.disk_usage(run).free) < HEADROOM:
            raise StorageFull(f"with it {run} would have {free} bytes left, and needs {HEADROOM}")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def publish(folder: Path) -> Path:
    """Let an `unfinished` folder appear under its name, all at once, once it is on the disk. Raises OSError; then it is
    gone."""
    target = folder.with_name(folder.name.removeprefix(".").removesuffix(".partial"))
    try:
        for file in folder.iterdir():
            _sync(file)
        shutil.rmtree(target, ignore_errors=True)  # of before a worker was lost
        os.rename(folder, target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return target


def remove_unfinished(run: Path) -> None:
    """Delete what a worker that was killed has left in a run's folder."""
    for folder in run.glob(".*.partial"):
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def export(checkpoint: Path, target: Path) -> None:
    """Copy what runs, without what only training needs. Raises OSError, ConfigError if `target` is there."""
    if target.exists():
        raise ConfigError(f"{target} is there already; name another folder, or delete it")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(checkpoint, partial, ignore=shutil.ignore_patterns(STATE, TENSORS))
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def optimizer_tensors(named: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """Masters that differ from their parameters, and the optimizer's state, by the parameters' names, in host memory.

    With shards, every worker calls this.
    """
    tensors: dict[str, Tensor] = {}
    for (name, parameter), master in zip(named.items(), optimizer.masters, strict=True):
        state = dict(optimizer.optimizer.state.get(master, {}))
        if master.dtype != parameter.dtype:
            state["master"] = master
        tensors |= {f"{name}/{key}": whole(value).cpu().clone() for key, value in sorted(state.items())}
    return tensors


@torch.no_grad()
def restore_optimizer(folder: Path, named: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Go on where `optimizer_tensors` was taken; parameters have been loaded."""
    tensors = load_file(folder / TENSORS)
    for (name, parameter), master in zip(named.items(), optimizer.masters, strict=True):
        saved = {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
        master.copy_(like(saved.pop("master", parameter.detach()), master))
        # A count of steps is one number, wherever the parameter lies.
        optimizer.optimizer.state[master] = {
            key: like(value, master) if value.shape == master.shape else value for key, value in saved.items()
        }
