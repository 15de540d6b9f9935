"""What is trained on: sources of streams, in an order that follows from the seed alone.

A step has the same streams whatever the number of workers, and an order can be taken up at any step: so a run that is
resumed, or has other workers, sees what it would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

from segcore.errors import ConfigError
from segcore.text import TextTokenizer
from segcore.training.stream import TrainingStream
from services.training.data_config import DataConfig
from services.training.samples import StreamMaker
from services.training.sources import SourceReport, open_source


class Draw(NamedTuple):
    """The `number`-th stream that is taken of a source, counted over all epochs. size: about how long it is."""

    source: int
    number: int
    size: int


class Loader:
    """Steps of streams. `batches` goes on from where the loader stands, and `state` is where it stands then."""

    def __init__(self, config: DataConfig, maker: StreamMaker) -> None:
        self.config = config
        self._sources = [
            open_source(source, maker, shuffle=config.shuffle, seed=f"{config.seed} {i}")
            for i, source in enumerate(config.sources)
        ]
        self._digest = blake2b(config.model_dump_json(exclude={"sources": {"__all__": {"files"}}}).encode())
        self._digest.update(maker.text.digest.encode())
        for source in self._sources:
            self._digest.update(source.digest())
        # The step that comes next, and how many streams each source had given before its bucket.
        self._step, self._taken = 0, [0] * len(self._sources)

    @property
    def reports(self) -> list[SourceReport]:
        """What was found in each source, and left out."""
        return [source.report for source in self._sources]

    @property
    def epoch_steps(self) -> int | None:
        """Steps in which every stream comes up once; None if there are several sources, or tasks."""
        streams = self._sources[0].report.streams
        return -(-streams // self.config.streams_per_step) if len(self._sources) == 1 and streams else None

    def digest(self) -> str:
        """A hash of everything that the streams depend on: configuration, files, tokenizer."""
        return self._digest.hexdigest()[:40]

    def state(self) -> dict[str, Any]:
        """Where the loader stands, as JSON can hold it."""
        return {"step": self._step, "taken": self._taken.copy(), "digest": self.digest()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises ConfigError if that was of other data."""
        if state.get("digest") != self.digest():
            raise ConfigError(
                "the data, or what is made of them, have changed since the run was stopped: begin a new run"
            )
        self._step, self._taken = int(state["step"]), [int(count) for count in state["taken"]]

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[list[TrainingStream]]:
        """This worker's share of each step, without end. Workers' shares are about as long as each other.

        Raises ConfigError if there are fewer streams in a step than workers.
        """
        if self.config.streams_per_step < world:
            raise ConfigError(f"streams_per_step={self.config.streams_per_step} is less than {world} workers")
        while True:
            bucket, taken = self._bucket()
            for at in range(self._step % self.config.bucket_steps, self.config.bucket_steps):
                streams = [self._sources[draw.source].make(draw.number) for draw in _share(bucket[at], rank, world)]
                self._step += 1
                if at + 1 == self.config.bucket_steps:
                    self._taken = taken
                yield streams

    def _bucket(self) -> tuple[list[list[Draw]], list[int]]:
        """The draws of the steps around the present one, and what each source has given after them."""
        number, size = self._step // self.config.bucket_steps, self.config.streams_per_step
        rng, taken = random.Random(f"{self.config.seed} bucket {number}"), self._taken.copy()
        weights = [source.weight for source in self.config.sources]
        draws = []
        for i in rng.choices(range(len(self._sources)), weights, k=size * self.config.bucket_steps):
            draws.append(Draw(i, taken[i], self._sources[i].size(taken[i])))
            taken[i] += 1
        if self.config.bucket_steps > 1:
            draws.sort(key=lambda draw: (draw.size, draw))
        steps = [draws[i : i + size] for i in range(0, len(draws), size)]
        if self.config.bucket_steps > 1:
            rng.shuffle(steps)
        return steps, taken


def open_data(config: DataConfig, tokenizer: TextTokenizer) -> Loader:
    """Open the sources of a configuration; every file is read once. Raises ConfigError."""
    return Loader(config, StreamMaker(tokenizer))


def _share(draws: list[Draw], rank: int, world: int) -> list[Draw]:
    """Dealt from the longest on, to every worker in turn and back again: nobody always has the longer of two."""
    longest_first = sorted(draws, key=lambda draw: (-draw.size, draw))
    turns = [*range(world), *reversed(range(world))]
    return [draw for i, draw in enumerate(longest_first) if turns[i % len(turns)] == rank]


def report_lines(reports: list[SourceReport], config: DataConfig) -> list[str]:
    """What people are told of the data."""
    lines = []
    for report, source in zip(reports, config.sources, strict=True):
        if source.tasks:
            lines.append(f"tasks: {', '.join(task.task for task in source.tasks)}")
            continue
        left = ", ".join(f"{count} {kind}" for kind, count in sorted(report.faults.items()))
        names = ", ".join(str(path) for path in source.files)
        lines.append(
            f"{names}: {report.documents} records, {report.streams} streams" + (f"; left out: {left}" if left else "")
        )
        lines += [f"  {fault}" for fault in report.told]
    return lines
