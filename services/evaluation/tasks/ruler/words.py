"""What RULER's samples are filled with: essays, one sentence over and over, lists of words."""

from __future__ import annotations

import json
import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from itertools import accumulate
from typing import Any

from segcore.errors import ConfigError
from segcore.tasks.haystack import ruler_data

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def sentences_of(text: str) -> list[str]:
    """A text's sentences."""
    return re.split(r"(?<=[.!?])\s+", text)


@lru_cache(maxsize=1)
def essay_words() -> list[str]:
    return re.sub(r"\s+", " ", json.loads(ruler_data("PaulGrahamEssays.json").read_text())["text"]).split(" ")


def _listed(name: str) -> list[str]:
    try:
        text = resources.files("wonderwords").joinpath("assets", f"{name}list.txt").read_text()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ConfigError("RULER's words come with a package: pip install 'wonderwords>=3'") from error
    return [word.rstrip() for word in text.splitlines()]


class _Pairs(Sequence[str]):
    """All adjective-noun in alphabetical order, millions of them, made as they are asked for."""

    def __init__(self, adjectives: list[str], nouns: list[str]) -> None:
        self._nouns = sorted(set(nouns))
        # Where "well-" stands before "well-kept-", their pairs are sorted together.
        self._groups: list[list[str]] = []
        for first in sorted(f"{word}-" for word in set(adjectives)):
            if self._groups and first.startswith(self._groups[-1][0]):
                self._groups[-1].append(first)
            else:
                self._groups.append([first])
        self._starts = list(accumulate((len(self._of(i)) for i in range(len(self._groups))), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        group = bisect_right(self._starts, index) - 1
        return self._of(group)[index - self._starts[group]]

    def _of(self, group: int) -> Sequence[str]:
        if len(self._groups[group]) == 1:
            return [self._groups[group][0] + noun for noun in self._nouns]
        return sorted({first + noun for first in self._groups[group] for noun in self._nouns})


@lru_cache(maxsize=1)
def pairs_of_words() -> Sequence[str]:
    return _Pairs(_listed("adjective"), _listed("noun"))


@lru_cache(maxsize=2)
def all_words(seed: int) -> list[str]:
    words = sorted({*_listed("noun"), *_listed("adjective"), *_listed("verb")})
    random.Random(seed).shuffle(words)
    return words
