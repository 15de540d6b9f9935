"""What is asked: cases, which are named without being made, and the items that they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from segcore.errors import ConfigError
from segcore.tasks.base import Item, Room, Task
from segcore.tasks.haystack import Haystack
from segcore.tasks.registry import TASKS, make_task
from segcore.text import ChatFormat, TextTokenizer
from segcore.turns import frame_tokens
from services.evaluation.config import EvalConfig, TaskSection


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
    """A task of a configuration. metric: the score that stands for it, one of `scores.METRICS`."""

    metric = "match"

    def __init__(self, section: TaskSection, config: EvalConfig) -> None:
        self.section, self.config = section, config

    @abstractmethod
    def cases(self) -> list[Case]:
        """All of them, in their order. Raises ConfigError."""

    @abstractmethod
    def item(self, case: Case, frame: Frame) -> Item:
        """Raises ConfigError."""

    @property
    def digest(self) -> str:
        """A hash of the data beside the configuration; "" if there are none."""
        return ""


class Synthetic(Suite):
    """Tasks of `segcore.tasks`."""

    def __init__(self, section: TaskSection, config: EvalConfig) -> None:
        super().__init__(section, config)
        if not section.lengths:
            raise ConfigError(f"task {section.name!r}: say of what lengths")
        whole = Haystack.named(config.haystack)
        self._haystack = whole.part("eval") if config.haystack_part == "eval" else whole
        for depth in section.depths[:1] or (None,):
            self._task(depth)

    def cases(self) -> list[Case]:
        section = self.section
        return [
            Case(section.name, length, depth, number)
            for length in section.lengths
            for depth in section.depths or (None,)
            for number in range(section.items)
        ]

    def item(self, case: Case, frame: Frame) -> Item:
        room = Room(
            split="eval",
            # The answer takes what it may, not what a right one would.
            length=case.length - self.section.max_tokens,
            haystack=self._haystack,
            count=frame.count,
            frame_tokens=frame.frame_tokens,
            turn_tokens=frame.turn_tokens,
        )
        return self._task(case.depth).make(room, f"{self.config.seed} {case.number}")

    @property
    def digest(self) -> str:
        return self._haystack.digest

    def _task(self, depth: float | None) -> Task:
        options = self.section.options | ({} if depth is None else {"depth": depth})
        return make_task(self.section.task, **options)


def open_suites(config: EvalConfig) -> dict[str, Suite]:
    """The tasks of a configuration by their names. Raises ConfigError."""
    return {section.name: _suite(section, config) for section in config.tasks}


def _suite(section: TaskSection, config: EvalConfig) -> Suite:
    known: dict[str, Callable[[TaskSection, EvalConfig], Suite]] = dict.fromkeys(TASKS, Synthetic)
    if section.task not in known:
        raise ConfigError(f"unknown task {section.task!r}; known: {', '.join(sorted(known))}")
    return known[section.task](section, config)
