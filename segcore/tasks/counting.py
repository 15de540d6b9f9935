"""Aggregation: what occurs most often; all of the document is needed for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from segcore.errors import ConfigError
from segcore.tasks.base import Item, Room, Turn, listed, rng_of
from segcore.tasks.words import ADJECTIVES, ANIMALS, NOUNS, SUBJECTS, TRADES, Source, pool

_WORDS = (*ADJECTIVES, *NOUNS, *ANIMALS, *TRADES, *SUBJECTS)


@dataclass(frozen=True, kw_only=True)
class CommonWords:
    """A numbered list of words, in which `common` of them occur `ratio` times as often as the others."""

    name: ClassVar[str] = "common-words"
    common: int = 10
    ratio: int = 10

    def __post_init__(self) -> None:
        if self.common < 1 or self.ratio < 2:
            raise ConfigError("common-words: common must be at least 1, and ratio at least 2")

    def make(self, room: Room, seed: str) -> Item:
        rng = rng_of(f"{self}", room, seed)
        words = list(dict.fromkeys(pool(_WORDS, room.split)))
        rng.shuffle(words)
        frequent, rare = words[: self.common], words[self.common :]
        turn = Turn(
            question=f"What are the {self.common} most common words in the list?",
            answer=f"The {self.common} most common words are {listed(frequent)}.",
            expected=tuple(frequent),
            lead=f"The {self.common} most common words are",
        )

        def listing(size: int) -> list[str]:
            """As many words as `size` says, all of the rare ones equally often; fewer of them in a short list."""
            repeats, some = divmod(size, len(rare))
            counts = [*(repeats + 1 for _ in rare[:some]), *(repeats for _ in rare[some:])]
            often = max(1, repeats) * self.ratio
            return [word for word, n in zip(rare, counts, strict=True) for _ in range(n)] + frequent * often

        document = _fitted(listing, _numbered, room, room.for_document([turn]), rng)
        return Item(name=f"{self.name} {seed}", task=self.name, document=document, turns=(turn,))


@dataclass(frozen=True, kw_only=True)
class FrequentWords:
    """Invented words whose frequencies fall as rank to the power of -alpha; dots are the most frequent."""

    name: ClassVar[str] = "frequent-words"
    alpha: float = 2.0

    def __post_init__(self) -> None:
        if self.alpha <= 1:
            raise ConfigError(f"frequent-words: alpha={self.alpha} must be above 1")

    def make(self, room: Room, seed: str) -> Item:
        rng = rng_of(f"{self}", room, seed)
        words = Source(rng, room.split).different("coded", max(8, room.length // 50))
        turn = Turn(
            question=(
                "Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently"
                " appeared words in the above coded text?"
            ),
            answer=f"The three most frequently appeared words are {listed(words[:3])}.",
            expected=tuple(words[:3]),
            lead="The three most frequently appeared words are",
        )
        shares = [rank**-self.alpha for rank in range(1, len(words) + 2)]

        def listing(size: int) -> list[str]:
            counts = [int(size * share / sum(shares)) for share in shares]
            return [word for word, n in zip(["...", *words], counts, strict=True) for _ in range(n)]

        document = _fitted(listing, " ".join, room, room.for_document([turn]), rng)
        return Item(name=f"{self.name} {seed}", task=self.name, document=document, turns=(turn,))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _fitted(
    listing: Callable[[int], list[str]],
    form: Callable[[Sequence[str]], str],
    room: Room,
    tokens: int,
    rng: random.Random,
) -> str:
    """The longest list, shuffled, that has at most so many tokens. Raises ConfigError."""

    def text(size: int) -> str:
        words = listing(size)
        random.Random(order).shuffle(words)
        return form(words)

    order = rng.random()
    low, high = 8, 16
    if room.count(text(low)) > tokens:
        raise ConfigError(f"{room.length} tokens are too few for a list of words")
    while room.count(text(high)) <= tokens:
        low, high = high, 2 * high
    while high - low > max(1, low // 256):
        middle = (low + high) // 2
        low, high = (middle, high) if room.count(text(middle)) <= tokens else (low, middle)
    return text(low)
