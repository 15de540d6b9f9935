"""What a task's scores are numbers of, and how people read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """value, change: of a score, and of the difference of two, as they are shown."""

    name: str
    lower_is_better: bool
    value: Callable[[float], float]
    change: Callable[[float], float]
    digits: int
    unit: str

    def told(self, score: float) -> str:
        return f"{self.value(score):.{self.digits}f}"

    def told_change(self, difference: float) -> str:
        return f"{self.change(difference):+.1f}{self.unit}"


def _percent(share: float) -> float:
    return 100 * share


# Scores are shares of one.
SHARE = Measure("score", False, _percent, _percent, 1, "")
# Scores are mean losses in nats; how perplexities differ is told as a share of the second one.
PERPLEXITY = Measure("perplexity", True, math.exp, lambda nats: 100 * math.expm1(nats), 2, "%")
