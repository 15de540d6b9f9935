"""Haystacks: the sentences of a text to hide facts in.

Natural text, for text that repeats itself starves the selectors: the query window holds the end of the haystack too,
and what recurs outscores the needle. Sentences from a grammar did so even with no five words in a row twice
(docs/lab-log.md).
"""

from __future__ import annotations

import importlib
import platform
import random
import re
from collections.abc import Iterator
from pathlib import Path

from segcore.errors import ConfigError


class Haystack:
    """The sentences of a text. name: what a report calls it."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self._sentences = re.split(r"(?<=[.!?:;])\s+", " ".join(text.split()))

    @classmethod
    def read(cls, path: Path) -> Haystack:
        """A UTF-8 text file. Raises ConfigError."""
        try:
            return cls(path.name, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} isn't a readable UTF-8 text: {error}") from error

    @classmethod
    def built_in(cls) -> Haystack:
        """Python's language reference, which comes with the interpreter. Raises ConfigError where it was left out."""
        name = f"Python {'.'.join(platform.python_version_tuple()[:2])} language reference"
        try:
            topics = importlib.import_module("pydoc_data.topics").topics
        except ImportError as error:
            raise ConfigError(f"this interpreter came without the {name}: name a text file") from error
        return cls(name, "\n".join(topics[topic] for topic in sorted(topics)))

    def sentences(self, rng: random.Random) -> Iterator[str]:
        """All sentences in order, each once, beginning at one that `rng` draws."""
        start = rng.randrange(len(self._sentences))
        yield from self._sentences[start:]
        yield from self._sentences[:start]
