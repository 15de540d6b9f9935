"""What a task is: cases, which are named without being made, and what becomes of one under an arm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NamedTuple

from segcore.tasks.base import Item, Turn
from segcore.text import ChatFormat, TextTokenizer
from segcore.turns import frame_tokens
from services.evaluation.arms import Answer, Arm, as_record
from services.evaluation.config import EvalConfig, TaskSection
from services.evaluation.measures import SHARE, Measure
from services.evaluation.scores import METRICS

# Characters of a needed passage that a result tells.
TOLD = 300
# Of a cell, unless the configuration says how many.
ITEMS = 8
ANSWER_TOKENS = 48


class Case(NamedTuple):
    """One item of a task: its cell, and its number there. length: 0 where the data say how long it is; depth: None
    where it is anywhere."""

    task: str
    length: int
    depth: float | None
    number: int

    @property
    def id(self) -> str:
        depth = "" if self.depth is None else f"@{self.depth:g}"
        return f"{self.task}/{self.length}{depth}/{self.number}"


@dataclass(frozen=True)
class Frame:
    """What items are made with: how tokens are counted, and what the chat format adds."""

    count: Callable[[str], int]
    frame_tokens: int
    turn_tokens: int

    @classmethod
    def of(cls, text: TextTokenizer) -> Frame:
        count = lru_cache(maxsize=2**17)(lambda piece: len(text.encode_continuation(piece)))
        return cls(count, *frame_tokens(text, ChatFormat.of(text)))


class Suite(ABC):
    """A task of a configuration. Raises ConfigError when it is made, for what can't be. measure: of its scores."""

    measure: ClassVar[Measure] = SHARE

    def __init__(self, section: TaskSection, config: EvalConfig) -> None:
        self.section, self.config = section, config

    @abstractmethod
    def cases(self) -> list[Case]:
        """All of them, in their order."""

    @abstractmethod
    def result(self, case: Case, frame: Frame, arm: Arm) -> dict[str, Any]:
        """What comes of a case: its "score", and what else a result has. Raises SegcoreError."""

    def document(self, case: Case) -> str:
        """Alike for cases about the same document, which a worker then reads once."""
        return case.id

    @property
    def digest(self) -> str:
        """A hash of the data beside the configuration; "" if there are none."""
        return ""

    @cached_property
    def _cases_about(self) -> Counter[str]:
        """How many there are, by document."""
        return Counter(map(self.document, self.cases()))

    def grid(self) -> list[Case]:
        """So many items of every length and depth."""
        section = self.section
        return [
            Case(section.name, length, depth, number)
            for length in section.lengths
            for depth in section.depths or (None,)
            for number in range(section.items or ITEMS)
        ]


class Asking(Suite):
    """A task whose items are asked about. metric: the score that stands for it."""

    metric: str = "match"

    @abstractmethod
    def item(self, case: Case, frame: Frame) -> Item:
        """Raises ConfigError."""

    @property
    def max_tokens(self) -> int:
        """Of an answer, unless the configuration says."""
        return self.section.max_tokens or ANSWER_TOKENS

    def scores(self, case: Case, turn: Turn, answer: str) -> dict[str, float]:
        """Of an answer, by the metric's name."""
        return {name: metric(answer, turn.expected, turn.match) for name, metric in METRICS.items()}

    def result(self, case: Case, frame: Frame, arm: Arm) -> dict[str, Any]:
        item = self.item(case, frame)
        wanted = (item, self.max_tokens, self.section.lead, self.config.truncate)
        answers = arm.answers(*wanted, shared=self._cases_about[self.document(case)] > 1)
        turns = [self._judged(case, item, turn, answer) for turn, answer in zip(item.turns, answers, strict=True)]
        scores = {name: sum(turn["scores"][name] for turn in turns) / len(turns) for name in turns[0]["scores"]}
        return {"score": scores[self.metric], "scores": scores, "turns": turns, "facts": item.facts}

    def _judged(self, case: Case, item: Item, turn: Turn, answer: Answer) -> dict[str, Any]:
        """A turn's answer beside what was wanted of it."""
        scores = self.scores(case, turn, answer.text)
        return {
            "question": turn.question,
            "expected": turn.expected,
            "needed": [item.document[start:end][:TOLD] for start, end in turn.needed],
            "score": scores[self.metric],
            "scores": scores,
            **as_record(answer),
        }
