"""What a task is: cases, which are named without being made, and what becomes of one under an arm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

from segcore.tasks.base import Item
from segcore.text import ChatFormat, TextTokenizer
from segcore.turns import frame_tokens
from services.evaluation.arms import Answer, Arm, as_record
from services.evaluation.config import EvalConfig, TaskSection
from services.evaluation.scores import METRICS

# Characters of a needed passage that a result tells.
TOLD = 300


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
    """A task of a configuration. Raises ConfigError when it is made, for what can't be."""

    def __init__(self, section: TaskSection, config: EvalConfig) -> None:
        self.section, self.config = section, config

    @abstractmethod
    def cases(self) -> list[Case]:
        """All of them, in their order."""

    @abstractmethod
    def result(self, case: Case, frame: Frame, arm: Arm) -> dict[str, Any]:
        """What comes of a case: "score", higher is better, and what else a result has. Raises SegcoreError."""

    @property
    def digest(self) -> str:
        """A hash of the data beside the configuration; "" if there are none."""
        return ""

    def grid(self) -> list[Case]:
        """So many items of every length and depth."""
        section = self.section
        return [
            Case(section.name, length, depth, number)
            for length in section.lengths
            for depth in section.depths or (None,)
            for number in range(section.items)
        ]


class Asking(Suite):
    """A task whose items are asked about. metric: the score that stands for it."""

    metric: ClassVar[str] = "match"

    @abstractmethod
    def item(self, case: Case, frame: Frame) -> Item:
        """Raises ConfigError."""

    def result(self, case: Case, frame: Frame, arm: Arm) -> dict[str, Any]:
        item, section = self.item(case, frame), self.section
        answers = arm.answers(item, section.max_tokens, section.lead, self.config.truncate)
        turns = [judged(item, i, answer) for i, answer in enumerate(answers)]
        scores = {name: sum(turn["scores"][name] for turn in turns) / len(turns) for name in METRICS}
        return {"score": scores[self.metric], "scores": scores, "turns": turns, "facts": item.facts}


def judged(item: Item, turn: int, answer: Answer) -> dict[str, Any]:
    """A turn's answer beside what was wanted of it."""
    said = item.turns[turn]
    return {
        "question": said.question,
        "expected": said.expected,
        "needed": [item.document[start:end][:TOLD] for start, end in said.needed],
        "scores": {name: metric(answer.text, said.expected, said.match) for name, metric in METRICS.items()},
        **as_record(answer),
    }
