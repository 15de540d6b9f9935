"""Needles: keys and values hidden in essays, in one sentence over and over, or among needles."""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass

from services.evaluation.tasks.ruler.base import SEED, Count, Maker, Sample
from services.evaluation.tasks.ruler.words import NOISE, essay_words, pairs_of_words, sentences_of

# 40 depths from 0 to 100, rounded to even as numpy does; none lies halfway.
DEPTHS = [round(100 * i / 39) for i in range(40)]


@dataclass(frozen=True)
class Needles:
    """What a needle task hides, and in what."""

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


class Niah(Maker):
    tokens = 128
    beyond = True

    def __init__(self, what: Needles, length: int, count: Count, seed: int = SEED) -> None:
        super().__init__(length, count, seed)
        self.what, self._keys = what, max(what.keys, what.queries)

    @property
    def step(self) -> int:
        return 500 if self.what.haystack == "essay" else 25 if self.length >= 4096 else 5

    @property
    def most(self) -> int | None:
        return len(essay_words()) if self.what.haystack == "essay" else None

    def draw(self, units: int) -> Sample:
        what, rng = self.what, self.rng
        keys: list[str] = []
        values: list[list[str]] = []
        needles: list[str] = []
        for _ in range(self._keys):
            keys.append(self._name(what.key))
            values.append([])
            for _ in range(what.values):
                values[-1].append(self._name(what.value))
                needles.append(self._needle(keys[-1], values[-1][-1]))
        random.Random(self.seed).shuffle(needles)
        context = self._in_essays(units, needles) if what.haystack == "essay" else self._in_lines(units, needles)
        asked = rng.sample(range(self._keys), what.queries)
        names = [keys[i] for i in asked]
        query = ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]
        answers = [value for i in asked for value in values[i]]
        if what.queries * what.values == 1:
            some, kind, are = "A", what.value[:-1], "is"
            asks = f"What is the special magic {kind} for {query} mentioned in the provided text?"
        else:
            some, kind, are = "Some", what.value, "are"
            asks = f"What are all the special magic {kind} for {query} mentioned in the provided text?"
        head = (
            f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will quiz"
            f" you about the {kind} afterwards.\n"
        )
        return Sample(
            head + context, asks, f" The special magic {kind} for {query} mentioned in the provided text {are}", answers
        )

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.what.value} for {key} is: {value}."

    def _name(self, kind: str) -> str:
        if kind == "numbers":
            return str(self.rng.randint(10**6, 10**7 - 1))
        if kind == "words":
            return self.rng.choice(pairs_of_words())
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def _in_essays(self, units: int, needles: list[str]) -> str:
        sentences = sentences_of(" ".join(essay_words()[:units]).strip())
        depths = self.rng.sample(DEPTHS, len(needles))
        places = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
        parts = []
        for i, needle in enumerate([*needles, None]):
            parts.append(" ".join(sentences[places[i] : places[i + 1]]))
            parts += [] if needle is None else [needle]
        return " ".join(parts)

    def _in_lines(self, units: int, needles: list[str]) -> str:
        if self.what.haystack == "repeat":
            lines = [NOISE] * units
        else:
            lines = [self._needle(self._name(self.what.key), self._name(self.what.value)) for _ in range(units)]
        places = sorted(self.rng.sample(range(units), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)
