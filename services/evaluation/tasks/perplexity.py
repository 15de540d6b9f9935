"""Perplexity by position: how well a text is predicted, the more of it has gone before."""

from __future__ import annotations

import math
import random
from typing import Any

from segcore.errors import ConfigError
from services.evaluation.arms import Arm, EngineArm
from services.evaluation.config import EvalConfig, TaskSection
from services.evaluation.measures import PERPLEXITY
from services.evaluation.tasks.base import Case, Frame, Suite
from services.evaluation.tasks.synthetic import haystack_of

# The first bucket of positions; each next one is as long as all before it.
FIRST = 256


class Perplexity(Suite):
    """Pieces of the haystack, `lengths` tokens each. The score is the mean loss of a piece, in nats."""

    measure = PERPLEXITY

    def __init__(self, section: TaskSection, config: EvalConfig) -> None:
        super().__init__(section, config)
        if not section.lengths or section.depths or section.options:
            raise ConfigError(f"task {section.name!r}: perplexity takes lengths and items")
        if any(not arm.local for arm in config.arms):
            raise ConfigError(f"task {section.name!r}: a service doesn't tell the likelihood of a text")
        self._haystack = haystack_of(config)

    def cases(self) -> list[Case]:
        return self.grid()

    def result(self, case: Case, frame: Frame, arm: Arm) -> dict[str, Any]:
        assert isinstance(arm, EngineArm)
        losses = arm.losses(self._text(case, frame), case.length)
        return {"score": sum(losses) / len(losses), "nats": by_position(losses), "facts": {}}

    @property
    def digest(self) -> str:
        return self._haystack.digest

    def _text(self, case: Case, frame: Frame) -> str:
        """Sentences in a row, of at least so many tokens."""
        pieces, left = [], case.length
        for sentence in self._haystack.sentences(random.Random(f"{self.config.seed} {case.number}")):
            pieces.append(sentence)
            left -= frame.count(f" {sentence}")
            if left < -8:
                return " ".join(pieces)
        raise ConfigError(f"{self._haystack.name} has fewer than {case.length} tokens: take a longer text")


def by_position(losses: list[float]) -> dict[str, list[float]]:
    """The summed loss and the count of tokens of each bucket, by the position that it begins with."""
    buckets: dict[str, list[float]] = {}
    for position, loss in enumerate(losses):
        first = 0 if position < FIRST else FIRST * 2 ** int(math.log2(position / FIRST))
        bucket = buckets.setdefault(str(first), [0.0, 0])
        bucket[0] += loss
        bucket[1] += 1
    return buckets
