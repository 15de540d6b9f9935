"""What a task makes: a document, turns that ask about it, and which of its characters each answer needs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from segcore.tasks.haystack import Haystack
from segcore.tasks.split import Split

# How an answer is judged: all of `expected` occur in it (the share that does), or the best of them counts.
Match = Literal["all", "any"]


class Span(NamedTuple):
    """Characters [start, end) of a document."""

    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question about the document.

    lead: how the answer begins, up to what is asked for; "" if it has no such beginning. answer: a whole answer, lead
    included, to train on. expected: what the answer must hold. needed: where the document says so; empty if everywhere.
    """

    question: str
    answer: str
    expected: tuple[str, ...]
    lead: str = ""
    match: Match = "all"
    needed: tuple[Span, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Item:
    """A document and its turns. name: says which one it is. facts: what reports group by, such as depth or form."""

    name: str
    task: str
    document: str
    turns: tuple[Turn, ...]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Room:
    """What an item is made for.

    length: tokens that the item has at most, questions, answers and chat frame included. count: tokens of a text that
    continues another one. frame_tokens, turn_tokens: of the chat template, for the item and for each of its turns.
    """

    split: Split
    length: int
    haystack: Haystack
    count: Callable[[str], int] = lambda text: len(text) // 4 + 1
    frame_tokens: int = 0
    turn_tokens: int = 0

    def for_document(self, turns: Iterable[Turn]) -> int:
        """Tokens that are left for the document, its facts included."""
        asked = (self.count("\n\n" + turn.question) + self.count(turn.answer) + self.turn_tokens for turn in turns)
        return self.length - self.frame_tokens - sum(asked)


class Task(Protocol):
    """Makes items. Its options are its fields, so that a configuration can name them."""

    name: ClassVar[str]

    def make(self, room: Room, seed: str) -> Item:
        """The item of a seed. Raises ConfigError for a length too short, or a haystack too small."""
        ...


def rng_of(task: str, room: Room, seed: str) -> random.Random:
    """Where everything random of an item comes from."""
    return random.Random(f"{task} {room.split} {room.length} {seed}")


def listed(texts: Sequence[str]) -> str:
    """a, b and c."""
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


@dataclass
class Writer:
    """A document as it grows, which remembers where a piece was put."""

    text: str = ""

    def add(self, piece: str) -> Span:
        """Append a piece; its characters, without white space around them."""
        start = len(self.text)
        self.text += piece
        body = piece.strip()
        inner = start + piece.find(body)
        return Span(inner, inner + len(body))
