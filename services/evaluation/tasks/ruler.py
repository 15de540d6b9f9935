"""RULER's tasks (arXiv 2404.06654) as NVIDIA's package nvidia-long-context-eval 26.3 makes them: the same words, in the
same order of draws, so that the same seed gives the same samples. Two things differ, and are tested apart from the
rest: sentences are cut by our own rule, for NLTK's needs data from elsewhere; and one sample's draws follow from all
before it, so samples are made in a row.
"""

from __future__ import annotations

import json
import random
import re
import string
import uuid
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import accumulate, islice
from typing import Any, NamedTuple

from segcore.errors import ConfigError
from segcore.tasks.base import Item, Match, Turn
from segcore.tasks.haystack import ruler_data
from services.evaluation.config import EvalConfig, TaskSection
from services.evaluation.tasks.base import Asking, Case, Frame

SEED = 42
Count = Callable[[str], int]


class Sample(NamedTuple):
    """document and question are the prompt, a line break in between; lead follows it at once."""

    document: str
    question: str
    lead: str
    answers: list[str]

    @property
    def prompt(self) -> str:
        return f"{self.document}\n{self.question}{self.lead}"


class Maker(ABC):
    """Samples of a task at a length, in RULER's order. step: haystack units by which it looks for the length.

    tokens: what an answer may take, which RULER counts into the length. beyond: it tries more units than there are.
    """

    tokens: int
    match: Match = "all"
    beyond = False

    def __init__(self, length: int, count: Count, seed: int = SEED) -> None:
        self.length, self.count, self.seed, self.rng = length, count, seed, random.Random(seed)

    @abstractmethod
    def draw(self, units: int) -> Sample:
        """One sample with so many units of haystack."""

    @property
    def step(self) -> int:
        return 10

    @property
    def most(self) -> int | None:
        """Units that there are; None: without end."""
        return None

    def tail(self, sample: Sample) -> str:
        """What is counted after the prompt while the length is looked for."""
        return " ".join(sample.answers)

    def samples(self) -> Iterator[Sample]:
        """Raises ConfigError for a length too short."""
        units = self._fitting()
        while True:
            for used in range(units, 0, -self.step):
                sample = self.draw(used)
                if self.count(sample.prompt) + self.tokens <= self.length:
                    break
            else:
                raise ConfigError(f"{self.length} tokens are too few for RULER's smallest sample")
            yield sample

    def _fitting(self) -> int:
        """The most units whose first draw fits."""
        units, total = self.step, 0
        while total + self.tokens < self.length:
            sample = self.draw(units)
            total = self.count(sample.prompt + self.tail(sample))
            if total + self.tokens > self.length:
                return units - self.step
            if self.most is not None and units + (0 if self.beyond else self.step) > self.most:
                return self.most
            units += self.step
        return units


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


class CommonWords(Maker):
    tokens = 120

    @property
    def most(self) -> int | None:
        return len(all_words(self.seed))

    def tail(self, sample: Sample) -> str:
        return " " + _numbered(sample.answers)

    def draw(self, units: int) -> Sample:
        if self.length < 4096:
            (shown, shown_answers), (listed, answers) = self._list(20, 3, 1), self._list(units, 6, 1)
        else:
            (shown, shown_answers), (listed, answers) = self._list(40, 10, 3), self._list(units, 30, 3)
        head = (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones"
            " that appear most often.\n"
        )
        question = "Question: What are the 10 most common words in the above list?"
        lead = " Answer: The top 10 words that appear most often in the list are:"
        example = f"{head}{shown}\n{question}{lead}{_numbered(shown_answers)}\n"
        return Sample(f"{example}{head}{listed}", question, lead, answers)

    def _list(self, words: int, often: int, seldom: int) -> tuple[str, list[str]]:
        drawn = self.rng.sample(all_words(self.seed), words)
        listed = drawn[:10] * often + drawn[10:] * seldom
        random.Random(self.seed).shuffle(listed)
        return _numbered(listed), drawn[:10]


class FrequentWords(Maker):
    """Coded words whose counts fall as 1/rank²; RULER looks for their number in its own way."""

    tokens = 50

    def samples(self) -> Iterator[Sample]:
        step = self.length // 32
        units = self.length // 6
        vocabulary = self._vocabulary()
        while self.count(self._of(vocabulary, units).prompt) < self.length:
            units += step
        units -= step
        while True:
            vocabulary, used = self._vocabulary(), units
            while self.count((sample := self._of(vocabulary, used)).prompt) > self.length:
                used -= step
            yield sample

    def draw(self, units: int) -> Sample:
        return self._of(self._vocabulary(), units)

    def _vocabulary(self) -> list[str]:
        size = self.length // 50
        words = [self._coded() for _ in range(size)]
        while len(set(words)) < size:
            words.append(self._coded())
        words = sorted(set(words))
        random.Random(self.seed).shuffle(words)
        return ["...", *words[1:]]

    def _coded(self) -> str:
        return "".join(self.rng.choices(string.ascii_lowercase, k=6))

    def _of(self, vocabulary: list[str], units: int) -> Sample:
        counts = [int(units * rank**-2.0 / ZETA_2) for rank in range(1, len(vocabulary) + 1)]
        words = [word for word, n in zip(vocabulary, counts, strict=True) for _ in range(n)]
        random.Random(self.seed).shuffle(words)
        head = (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently"
            " appeared coded words. "
        )
        question = (
            "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most"
            " frequently appeared words in the above coded text?"
        )
        lead = " Answer: According to the coded text above, the three most frequently appeared words are:"
        return Sample(head + " ".join(words), question, lead, vocabulary[1:4])


class Questions(Maker):
    tokens = 32
    match: Match = "any"

    def __init__(self, data: str, length: int, count: Count, seed: int = SEED) -> None:
        super().__init__(length, count, seed)
        self._data, self._next, self._looking = data, 0, True

    @property
    def most(self) -> int | None:
        return len(paragraphs(self._data)[0])

    def tail(self, sample: Sample) -> str:
        return f" {sample.answers}"

    def samples(self) -> Iterator[Sample]:
        for sample in super().samples():
            yield sample
            self._next += 1

    def draw(self, units: int) -> Sample:
        texts, questions = paragraphs(self._data)
        text, answers, own, more = questions[self._next % len(questions)]
        if units >= len(texts):
            chosen = [*texts]
        elif units - len(own) > len(more):
            known = {*own, *more}
            others = [i for i in range(len(texts)) if i not in known]
            extra = self.rng.sample(others, max(0, units - len(own) - len(more)))
            chosen = [texts[i] for i in (*own, *more, *extra)]
        else:
            chosen = [texts[i] for i in (*own, *self.rng.sample(more, units - len(own)))]
        random.Random(self.seed).shuffle(chosen)
        context = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(chosen, 1))
        ask = (
            "Answer the question based on the given documents. Only give me the answer and do not output any other"
            " words."
        )
        head = f"{ask}\n\nThe following are given documents.\n\n{context}\n\n{ask}\n"
        return Sample(head, f"Question: {text}", " Answer:", answers)


NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# 40 depths from 0 to 100, rounded to even as numpy does; none lies halfway.
DEPTHS = [round(100 * i / 39) for i in range(40)]
ZETA_2 = 1.6449340668482264

MAKERS: dict[str, Callable[[int, Count], Maker]] = {
    "niah_single_1": lambda length, count: Niah(Needles("repeat"), length, count),
    "niah_single_2": lambda length, count: Niah(Needles("essay"), length, count),
    "niah_single_3": lambda length, count: Niah(Needles("essay", value="uuids"), length, count),
    "niah_multikey_1": lambda length, count: Niah(Needles("essay", keys=4), length, count),
    "niah_multikey_2": lambda length, count: Niah(Needles("needle"), length, count),
    "niah_multikey_3": lambda length, count: Niah(Needles("needle", key="uuids", value="uuids"), length, count),
    "niah_multivalue": lambda length, count: Niah(Needles("essay", values=4), length, count),
    "niah_multiquery": lambda length, count: Niah(Needles("essay", queries=4), length, count),
    "cwe": CommonWords,
    "fwe": FrequentWords,
    "qa_1": lambda length, count: Questions("squad", length, count),
    "qa_2": lambda length, count: Questions("hotpotqa", length, count),
}


class Ruler(Asking):
    """One of RULER's tasks. Its lengths count the prompt and RULER's allowance for the answer, not the chat frame."""

    def __init__(self, section: TaskSection, config: EvalConfig) -> None:
        super().__init__(section, config)
        if not section.lengths or section.depths or section.options:
            raise ConfigError(f"task {section.name!r}: RULER's tasks take lengths, items and lead")
        self._made: dict[int, tuple[Iterator[Sample], list[Sample]]] = {}

    def cases(self) -> list[Case]:
        return self.grid()

    def item(self, case: Case, frame: Frame) -> Item:
        maker = MAKERS[self.section.task](case.length, frame.count)
        source, made = self._made.setdefault(case.length, (maker.samples(), []))
        made += islice(source, max(0, case.number + 1 - len(made)))
        sample = made[case.number]
        turn = Turn(
            question=sample.question,
            answer=", ".join(sample.answers),
            expected=tuple(sample.answers),
            lead=sample.lead.strip(),
            match=maker.match,
        )
        name = f"{self.section.task} {case.length} {case.number}"
        return Item(name=name, task=self.section.task, document=sample.document.strip(), turns=(turn,))


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


# A question: its text, answers, the paragraphs that answer it, and others of the same article.
Asked = tuple[str, list[str], list[int], list[int]]


@lru_cache(maxsize=2)
def paragraphs(data: str) -> tuple[list[str], list[Asked]]:
    raw = json.loads(ruler_data(f"{data}.json").read_text())
    if data == "squad":
        articles = [[p["context"] for p in article["paragraphs"]] for article in raw["data"]]
        texts = sorted({text for article in articles for text in article})
        index = {text: i for i, text in enumerate(texts)}
        questions = [
            (qa["question"], [a["text"] for a in qa["answers"]], [own], [index[t] for t in texts_of if index[t] != own])
            for article, texts_of in zip(raw["data"], articles, strict=True)
            for p in article["paragraphs"]
            for own in [index[p["context"]]]
            for qa in p["qas"]
            if not qa["is_impossible"]
        ]
        return texts, questions
    texts = sorted({f"{title}\n{''.join(said)}" for question in raw for title, said in question["context"]})
    index = {text: i for i, text in enumerate(texts)}
    return texts, [
        (q["question"], [q["answer"]], [index[f"{title}\n{''.join(said)}"] for title, said in q["context"]], [])
        for q in raw
    ]


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
