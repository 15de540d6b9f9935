"""What a run tells while it runs: JSON lines and TensorBoard in its folder, lines for whoever follows it, trackers."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from services.training.config import TrainConfig

LINES = "metrics.jsonl"
# Begins the lines of a job's log that are meant for programs; a JSON object follows.
MARK = "segcore-train "
# So often, at most, such a line is written about steps.
TELL_EVERY_S = 0.5


class Recorder(Protocol):
    """Takes numbers by step; steps of a run that goes on are those after the checkpoint."""

    def record(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def tell(self, **values: Any) -> None:
        """Say something to whoever follows the run."""
        ...

    def close(self) -> None: ...


class Silent:
    """Of the workers that aren't the first."""

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def tell(self, **values: Any) -> None:
        pass

    def close(self) -> None:
        pass


class RunRecorder:
    """Writes to the run's folder, prints, and passes on to the trackers that were asked for."""

    def __init__(self, config: TrainConfig, start: int) -> None:
        from tensorboardX import SummaryWriter  # brings torch along, which who only follows a run doesn't need

        config.folder.mkdir(parents=True, exist_ok=True)
        self._steps, self._told = config.steps, 0.0
        path = config.folder / LINES
        kept = [line for line in read_lines(path) if line["step"] <= start] if start else []
        self._lines = path.open("w")
        for line in kept:
            self._write(line)
        self._board = SummaryWriter(str(config.folder / "tensorboard"), purge_step=start + 1 if start else None)
        self._trackers = [_TRACKERS[name](config) for name in config.metrics.trackers]

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write({"step": step, **metrics})
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.log(dict(metrics), step)
        if step == self._steps or "eval_loss" in metrics or time.monotonic() - self._told > TELL_EVERY_S:
            self.tell(step=step, steps=self._steps, **metrics)
            self._told = time.monotonic()

    def tell(self, **values: Any) -> None:
        tell(**values)

    def close(self) -> None:
        self._lines.close()
        self._board.close()
        for tracker in self._trackers:
            tracker.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()


def tell(**values: Any) -> None:
    """Print a line that `told` finds again in a log."""
    # Not `print`, which Ray Train replaces in its workers by one that writes twice.
    sys.stdout.write(MARK + json.dumps(values) + "\n")
    sys.stdout.flush()


def told(line: str) -> dict[str, Any] | None:
    """What a line of a log says to programs; Ray puts the worker's name before it."""
    _, mark, rest = line.partition(MARK)
    if not mark:
        return None
    try:
        return dict(json.loads(rest.strip().removesuffix("\x1b[0m")))
    except ValueError:
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A run's metrics by step, as far as they were written."""
    return list(_parsed(path.read_text().splitlines())) if path.exists() else []


def _parsed(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # the last, if the worker was killed while it wrote
            return


class Tracker(Protocol):
    """Takes numbers by step, too."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _Mlflow:
    """A run that goes on is a new run of the same name. Kept in `storage`, unless MLFLOW_TRACKING_URI says where."""

    def __init__(self, config: TrainConfig) -> None:
        self._mlflow = importlib.import_module("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            self._mlflow.set_tracking_uri(f"sqlite:///{(config.storage / 'mlflow.db').resolve()}")
        self._mlflow.set_experiment("segcore")
        self._mlflow.start_run(run_name=config.name, tags={"segcore.config": config.digest})

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(metrics, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _Wandb:
    """A run that goes on is the same run. What W&B keeps on this machine is in the run's folder."""

    def __init__(self, config: TrainConfig) -> None:
        self._run = importlib.import_module("wandb").init(
            project="segcore",
            id=f"{config.name}-{config.digest}",
            name=config.name,
            config=config.model_dump(mode="json"),
            resume="allow",
            dir=str(config.folder),
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Callable[[TrainConfig], Tracker]] = {"mlflow": _Mlflow, "wandb": _Wandb}
