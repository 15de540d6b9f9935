"""A run's folder: checkpoints that appear whole, what they say of the run, and the export. No torch here.

checkpoint-0000100/          see `checkpoint.py`
.checkpoint-0000200.partial  one that is being written, where it is to stay
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segcore.config import MIB
from segcore.errors import ConfigError, StorageFull

# What only training needs of a checkpoint: `Progress`, and its tensors.
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
    return max(checkpoints(run), default=None)


def checkpoints(run: Path) -> list[Path]:
    """Those in a run's folder, the newest last."""
    return sorted(path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))


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
