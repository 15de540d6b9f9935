"""A maker of RULER's samples: how it looks for the length, and what one sample is."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

from segcore.errors import ConfigError
from segcore.tasks.base import Match

SEED = 42
Count = Callable[[str], int]


class Sample(NamedTuple):
    """document and question are the prompt, a line break in between; lead follows it at once."""

    document: str
    question: str
    lead: str
    answers: list[str]

    @property
    def prompt(self) -> str:
        return f"{self.document}\n{self.question}{self.lead}"


class Maker(ABC):
    """Samples of a task at a length, in RULER's order. step: haystack units by which it looks for the length.

    tokens: what an answer may take, which RULER counts into the length. beyond: it tries more units than there are.
    """

    tokens: int
    match: Match = "all"
    beyond = False

    def __init__(self, length: int, count: Count, seed: int = SEED) -> None:
        self.length, self.count, self.seed, self.rng = length, count, seed, random.Random(seed)

    @abstractmethod
    def draw(self, units: int) -> Sample:
        """One sample with so many units of haystack."""

    @property
    def step(self) -> int:
        return 10

    @property
    def most(self) -> int | None:
        """Units that there are; None: without end."""
        return None

    def tail(self, sample: Sample) -> str:
        """What is counted after the prompt while the length is looked for."""
        return " ".join(sample.answers)

    def samples(self) -> Iterator[Sample]:
        """Raises ConfigError for a length too short."""
        units = self._fitting()
        while True:
            for used in range(units, 0, -self.step):
                sample = self.draw(used)
                if self.count(sample.prompt) + self.tokens <= self.length:
                    break
            else:
                raise ConfigError(f"{self.length} tokens are too few for RULER's smallest sample")
            yield sample

    def _fitting(self) -> int:
        """The most units whose first draw fits."""
        units, total = self.step, 0
        while total + self.tokens < self.length:
            sample = self.draw(units)
            total = self.count(sample.prompt + self.tail(sample))
            if total + self.tokens > self.length:
                return units - self.step
            if self.most is not None and units + (0 if self.beyond else self.step) > self.most:
                return self.most
            units += self.step
        return units
