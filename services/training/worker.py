"""A worker's run: steps over its share of the streams, evaluation, checkpoints. Knows workers, but no Ray.

Every worker takes every step; what fails on one, and would fail again, ends the run on all of them. At each step
random state is seeded by the run's seed, the step and the worker's rank: so a run that goes on has the random numbers
of one that was never interrupted.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

from segcore.errors import LimitExceeded, NonFiniteLoss, SegcoreError, StorageFull
from segcore.training.stream import TrainingStream
from segcore.training.tbptt import StreamLoss
from services.training.checkpoint import optimizer_tensors, restore_optimizer, save_training
from services.training.config import OptimizerSection, TrainConfig
from services.training.data import open_data, report_lines
from services.training.folders import Progress, checkpoint_name, latest, remove_unfinished, unfinished
from services.training.learners import open_learner, seed_everything
from services.training.metrics import Recorder, RunRecorder, Silent
from services.training.parallel import Optimizer, Replicated, Sharded, Workers
from services.training.schedule import rate

Metrics = dict[str, float]
T = TypeVar("T")


class Report(Protocol):
    """Takes over a checkpoint, for `publish`. Every worker calls it, one with a folder, if there is one."""

    def __call__(self, metrics: Metrics, folder: Path | None, name: str) -> None: ...


class Run:
    """One worker's part of a run, from the newest checkpoint in the run's folder, if there is one.

    Raises SegcoreError, on all workers alike.
    """

    def __init__(self, config: TrainConfig, workers: Workers, device: torch.device, report: Report) -> None:
        self.config, self.workers, self._report = config, workers, report
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton and recordings take the thread's, whatever their tensors lie on
        start = workers.gather(latest(config.folder))[0]
        self.learner = agreed(workers, partial(open_learner, config, device, start))
        self.optimizer = _optimizer(config, list(self.learner.named.values()), workers, device)
        self.data = agreed(workers, lambda: open_data(config.data, self.learner.model.tokenizer))
        self.data_digest = self.data.digest()
        self.step, self.metrics = 0, Metrics()
        if start is not None:
            self._restore(start, agreed(workers, partial(self._checked, start)))
        self.recorder: Recorder = Silent()

    def train(self) -> Progress:
        """Take the steps that are left."""
        if self.workers.rank == 0:
            remove_unfinished(self.config.folder)
            self.recorder = RunRecorder(self.config, self.step)
            for line in report_lines(self.data.reports, self.config.data):
                self.recorder.tell(note=line)
            self.recorder.tell(note=f"from step {self.step} on with {self.workers.world} workers")
        with contextlib.closing(self.recorder):
            if self.step == 0 and self.config.evaluation is not None:
                self._record(self.evaluate())
            batches = self.data.batches(self.workers.rank, self.workers.world)
            while self.step < self.config.steps:
                self.take_step(next(batches))
                if self._due(self.config.checkpoints.every):
                    self._checkpoint()
        return self.progress()

    def take_step(self, batch: Sequence[TrainingStream]) -> None:
        """Move the weights by the mean loss of the targets of all workers' streams, or of the streams."""
        began = time.monotonic()
        seed_everything(self.config.seed, self.step, self.workers.rank)
        mine = sum(stream.valid_tokens for stream in batch)
        taught = sum(self.learner.choices(stream) for stream in batch)
        valid, choices, seen, streams = self.workers.sum(
            mine, taught, sum(len(stream.tokens_T) for stream in batch), len(batch)
        )
        by_streams = self.config.balance == "streams"
        # What each stream's sum is divided by.
        shares = [max(1, round(streams * s.valid_tokens if by_streams else valid)) for s in batch]
        for group in self.optimizer.optimizer.param_groups:
            group["lr"] = self.config.optimizer.learning_rate * rate(self.config.schedule, self.step, self.config.steps)
        try:
            losses = agreed(self.workers, lambda: self._losses(batch, shares, round(choices)))
            norm = self.optimizer.step()
            self.learner.moved()
        except NonFiniteLoss as error:
            raise self._kept(batch, error) from error
        total, selectors, recall = self.workers.sum(
            sum(loss.total / share for loss, share in zip(losses, shares, strict=True)),
            sum(loss.selectors.total for loss in losses),
            sum(loss.selectors.recall for loss in losses),
        )
        self.step += 1
        metrics = {
            "loss": total,
            "learning_rate": self.optimizer.optimizer.param_groups[0]["lr"],
            "gradient_norm": norm,
            "targets": valid,
            "tokens_per_s": seen / (time.monotonic() - began),
        }
        if choices:
            metrics |= {"selector_loss": selectors / choices, "selector_recall": recall / choices}
        self._record(metrics)

    def evaluate(self) -> Metrics:
        """The loss of the evaluation's streams, and the share of their answers that greedy decoding would give."""
        config = self.config.evaluation
        assert config is not None
        loader = agreed(self.workers, lambda: open_data(config.data, self.learner.model.tokenizer))
        streams = islice(chain.from_iterable(loader.batches(0, 1)), config.streams)
        mine = list(islice(streams, self.workers.rank, None, self.workers.world))
        scorer = self.learner.scorer()
        scores = agreed(self.workers, lambda: [scorer.score(stream) for stream in mine])
        total, tokens, right, answers = self.workers.sum(
            sum(score.total for score in scores),
            sum(score.tokens for score in scores),
            sum(score.right for score in scores),
            sum(score.answers for score in scores),
        )
        metrics = {"eval_loss": total / max(1, tokens)}
        return metrics | {"eval_accuracy": right / answers} if answers else metrics

    def progress(self) -> Progress:
        return Progress(
            step=self.step,
            data=self.data.state(),
            data_digest=self.data_digest,
            digests=self.config.digests,
            metrics=self.metrics,
        )

    def _losses(self, batch: Sequence[TrainingStream], shares: Sequence[int], choices: int) -> list[StreamLoss]:
        try:
            pairs = zip(batch, shares, strict=True)
            return [self.learner.loss_and_grad(stream, share, choices) for stream, share in pairs]
        except torch.OutOfMemoryError as error:
            raise LimitExceeded(
                "the device's memory is used up: set checkpoint_layers, or take smaller segments or more workers with"
                f" parallel: fsdp ({str(error).splitlines()[0]})"
            ) from error

    def _checked(self, start: Path) -> Progress:
        progress = Progress.read(start)
        progress.check(self.config.digests, self.data_digest)
        return progress

    def _restore(self, start: Path, progress: Progress) -> None:
        restore_optimizer(start, self.learner.named, self.optimizer)
        self.data.restore(progress.data)
        self.step, self.metrics = progress.step, progress.metrics

    def _record(self, metrics: Metrics) -> None:
        self.metrics = self.metrics | metrics
        if self.step % self.config.metrics.every == 0 or self.step == self.config.steps or "eval_loss" in metrics:
            self.recorder.record(self.step, metrics)

    def _due(self, every: int | None) -> bool:
        return self.step == self.config.steps or (every is not None and self.step % every == 0)

    def _checkpoint(self) -> None:
        if self.config.evaluation is not None:
            self._record(self.evaluate())
        tensors = optimizer_tensors(self.learner.named, self.optimizer, self.learner.model.lm.spec.dtype)
        name, folder = checkpoint_name(self.step), None
        if self.workers.rank == 0:
            try:
                with unfinished(self.config.folder, name) as folder:
                    self.learner.save(folder, self.step)
                    save_training(folder, tensors, self.progress())
            except (OSError, SafetensorError, StorageFull) as error:
                folder = None
                self.recorder.tell(warning=f"no checkpoint at step {self.step}; the last one stays: {error}")
        self._report(self.metrics | {"step": self.step}, folder, name)

    def _kept(self, batch: Sequence[TrainingStream], error: NonFiniteLoss) -> NonFiniteLoss:
        """The error, once the step's streams are saved beside the run."""
        folder = self.config.folder / "nonfinite"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"step-{self.step:07d}-rank-{self.workers.rank}.json"
        streams = [
            {"name": s.name, "tokens": s.tokens_T.tolist(), "targets": s.targets_T.tolist(), "marks": s.marks}
            for s in batch
        ]
        file.write_text(json.dumps(streams))
        return NonFiniteLoss(f"step {self.step}: {error.message}; the step's streams are in {folder}", **error.details)


def agreed(workers: Workers, act: Callable[[], T]) -> T:
    """Do something on every worker. What fails on one in a way that would repeat itself is raised on all."""
    result: list[T] = []
    failed: SegcoreError | None = None
    try:
        result.append(act())
    except SegcoreError as error:
        failed = error
    for raised in workers.gather(failed):
        if raised is not None:
            raise raised
    return result[0]


def _optimizer(
    config: TrainConfig, parameters: list[nn.Parameter], workers: Workers, device: torch.device
) -> Optimizer:
    make, max_norm = partial(_adamw, config.optimizer), config.optimizer.max_norm
    if config.workers.parallel == "fsdp" and workers.world > 1:
        return Sharded(parameters, make, max_norm, workers, device)
    return Replicated(parameters, make, max_norm, workers)


def _adamw(config: OptimizerSection, masters: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in masters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in masters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas, eps=config.eps
    )
