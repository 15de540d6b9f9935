"""Questions about paragraphs, among paragraphs that distract: SQuAD and HotpotQA, in their published formats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from segcore.errors import ConfigError
from segcore.tasks.base import Item, Room, Span, Turn, Writer, rng_of
from segcore.tasks.haystack import ruler_data
from segcore.tasks.split import Split, split_of


@dataclass(frozen=True)
class _Question:
    """needed: paragraphs that answer it, as indices."""

    text: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]


@dataclass(frozen=True)
class _Corpus:
    paragraphs: tuple[str, ...]
    questions: tuple[_Question, ...]
    digest: str


@dataclass(frozen=True, kw_only=True)
class Questions:
    """data: "squad" or "hotpotqa", which RULER's package ships, or a file in one of their formats. turns: questions."""

    name: ClassVar[str] = "questions"
    data: str = "squad"
    turns: int = 1

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise ConfigError("questions: turns must be at least 1")

    def digest(self, split: Split) -> str:
        """A hash of the data. Raises ConfigError for data that are missing, malformed or too few."""
        corpus = _corpus(self.data, split)
        if self.turns > len(corpus.questions):
            raise ConfigError(f"questions: {self.data} has {len(corpus.questions)} for {split}, and not {self.turns}")
        return corpus.digest

    def make(self, room: Room, seed: str) -> Item:
        rng = rng_of(f"{self}", room, seed)
        corpus = _corpus(self.data, room.split)
        asked = rng.sample(corpus.questions, self.turns)
        drafts = [_turn(question, ()) for question in asked]
        needed = list(dict.fromkeys(i for question in asked for i in question.needed))
        others = [i for i in range(len(corpus.paragraphs)) if i not in set(needed)]
        left = room.for_document(drafts) - sum(_cost(corpus.paragraphs[i], room) for i in needed)
        if left < 0:
            raise ConfigError(f"questions: {room.length} tokens are too few for {len(needed)} paragraphs")
        chosen = [*needed]
        for i in rng.sample(others, len(others)):
            left -= _cost(corpus.paragraphs[i], room)
            if left < 0:
                break
            chosen.append(i)
        rng.shuffle(chosen)
        writer, spans = Writer(), {}
        for number, i in enumerate(chosen, 1):
            writer.add(("\n\n" if writer.text else "") + f"Document {number}:\n")
            spans[i] = writer.add(corpus.paragraphs[i])
        turns = tuple(_turn(question, tuple(spans[i] for i in question.needed)) for question in asked)
        told = {"form": self.data, "documents": len(chosen)}
        return Item(name=f"{self.name} {seed}", task=self.name, document=writer.text, turns=turns, facts=told)


def _turn(question: _Question, needed: tuple[Span, ...]) -> Turn:
    return Turn(
        question=(
            "Answer the question based on the given documents. Only give me the answer and do not output any other"
            f" words.\n\nQuestion: {question.text}"
        ),
        answer=question.answers[0],
        expected=question.answers,
        match="any",
        needed=tuple(sorted(needed)),
    )


def _cost(paragraph: str, room: Room) -> int:
    return room.count(f"\n\nDocument 1000:\n{paragraph}")


@lru_cache(maxsize=8)
def _corpus(data: str, split: Split) -> _Corpus:
    """What one split may use: paragraphs go by their article, and questions by their paragraphs."""
    path = ruler_data(f"{data}.json") if data in ("squad", "hotpotqa") else Path(data)
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
        read: Callable[[Any], Iterator[_Read]] = _squad if isinstance(raw, dict) else _hotpot
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return _gathered(path.name, digest, read(raw), split)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is neither in SQuAD's format nor in HotpotQA's: {error!r}") from error


# Paragraphs by article, a question, its answers, and which of the paragraphs it needs.
_Read = tuple[list[tuple[str, str]], str, tuple[str, ...], set[int]]


def _gathered(name: str, digest: str, read: Iterator[_Read], split: Split) -> _Corpus:
    paragraphs: dict[str, int] = {}
    questions = []
    for group, text, answers, needed in read:
        if any(split_of(group[i][0]) != split for i in needed):
            continue
        own = {
            i: paragraphs.setdefault(p, len(paragraphs))
            for i, (title, p) in enumerate(group)
            if split_of(title) == split
        }
        questions.append(_Question(text, answers, tuple(own[i] for i in sorted(needed))))
    if not questions:
        raise ConfigError(f"{name} has no question for the {split} split")
    return _Corpus(tuple(paragraphs), tuple(questions), digest)


def _squad(raw: Any) -> Iterator[_Read]:
    for article in raw["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in qa["answers"]))
                if answers and not qa.get("is_impossible"):
                    yield [(article["title"], paragraph["context"])], qa["question"], answers, {0}


def _hotpot(raw: Any) -> Iterator[_Read]:
    for question in raw:
        group = [(title, f"{title}\n{''.join(sentences)}") for title, sentences in question["context"]]
        names = {title for title, _ in question["supporting_facts"]}
        yield group, question["question"], (question["answer"],), {i for i, (t, _) in enumerate(group) if t in names}
