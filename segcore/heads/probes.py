"""Probe streams: facts hidden in a text, and questions that need them.

Key-value needles as in RULER (arXiv 2404.06654), in several forms so that no choice is tuned to one. A stream holds
several facts of one form, so that the words of a question find more than one place; each is asked for in turn, so that
a document is run once and tells several times.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from segcore.errors import ConfigError
from segcore.tasks.haystack import Haystack
from segcore.text import ChatFormat, TextTokenizer


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Common words, which haystacks hold too.
ADJECTIVES = _words("""
    old quiet narrow bright heavy patient distant rusty gentle crooked pale stubborn hollow careful muddy golden
    silent broken curious empty northern clumsy thin borrowed wooden ragged cheerful bitter smooth faded wild humble
    foreign sharp tired warm shallow noisy steep generous frozen modest damp ancient brisk lonely polished crowded
    plain nervous velvet tilted dusty loyal secret salty copper awkward lazy marble
""")
NOUNS = _words("""
    river lantern garden clerk engine orchard letter sailor window kettle bridge teacher market ladder painter
    harbour coat piano miller forest basket doctor chimney map farmer clock valley tailor ferry chapel rope soldier
    mirror barrel widow tower hammer cousin meadow candle judge wagon island baker violin cellar stove traveller
    fence pilot stable button gardener saddle printer cabin blanket anchor notebook shepherd quarry balcony cook
    drawer fountain mason
""")
PLACES = _words("""
    Aldersea Bramwick Corvale Dunmarrow Eastholm Farrowby Glenmore Harrowgate Ilverton Juniper Kestrelford Lindenau
    Marrowby Netherfield Oakhampton Pellworth Quarrendon Rosewick Silverdale Thornbury Underhill Valdane Westmere
    Yarrowdale Zellham Ashcombe Birchover Coldwater Driftwood Elmsworth
""")
NAMES = _words("""
    Agnes Bernard Cecily Dorian Edith Felix Greta Hugo Irene Jasper Klara Leopold Mabel Nathan Olive Percy Quentin
    Rosa Silas Thea Ursula Victor Wanda Xavier Yvonne Zachary Anselm Beatrix Conrad Delia
""")


@dataclass(frozen=True)
class Template:
    """One form of needle.

    statement, question, lead (the answer up to the value): texts with {key}; the value follows the statement and the
    lead after a space. key, value: draw one.
    """

    name: str
    statement: str
    question: str
    lead: str
    key: Callable[[random.Random], str]
    value: Callable[[random.Random], str]


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=count))


TEMPLATES = (
    Template(
        "number",
        "One of the special magic numbers for {key} is:",
        "What is the special magic number for {key} mentioned in the provided text?",
        "The special magic number for {key} mentioned in the provided text is:",
        lambda rng: f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}",
        lambda rng: str(rng.randint(1_000_000, 9_999_999)),
    ),
    Template(
        "watchword",
        "The watchword of the {key} station is",
        "What is the watchword of the {key} station?",
        "The watchword of the {key} station is",
        lambda rng: rng.choice(PLACES),
        lambda rng: " ".join(rng.sample(NOUNS, 3)),
    ),
    Template(
        "hiding place",
        "{key} keeps the spare key in",
        "Where does {key} keep the spare key?",
        "{key} keeps the spare key in",
        lambda rng: f"{rng.choice(NAMES)} {rng.choice(PLACES)}",
        lambda rng: f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} behind the {rng.choice(NOUNS)}",
    ),
    Template(
        "shelf",
        "Parcel {key} was put on shelf",
        "On which shelf was parcel {key} put?",
        "Parcel {key} was put on shelf",
        lambda rng: str(rng.randint(1_000, 9_999)),
        lambda rng: f"{_letters(rng, 2)}-{rng.randint(10, 99)}-{_letters(rng, 3)}",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Which streams are probed: `rounds` for each length and template.

    lengths: tokens up to the turn mark, at most; within the model's positions, for these streams have full attention.
    depths: where the facts of a stream stand, from 0 (the oldest candidate) to 1 (the latest). Each is asked for in
        turn, and the others are its distractors.
    seed: everything random follows from it.
    """

    templates: tuple[Template, ...] = TEMPLATES
    lengths: tuple[int, ...] = (1024, 2048, 4096, 7168)
    depths: tuple[float, ...] = (0.05, 0.2, 0.35, 0.45, 0.55, 0.65, 0.8, 0.95)
    rounds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.templates and self.lengths and self.depths) or self.rounds < 1:
            raise ConfigError("probing needs at least one template, length, depth and round")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError(f"depths {self.depths} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One fact, asked for at the end of a stream's document.

    turn: tokens from the document to the turn mark. after_mark: assistant header, lead, value.
    candidates: positions that a selection may choose. needle: positions of the fact.
    value: positions of its value, which the last len(value) tokens of after_mark repeat.
    """

    turn: list[int]
    after_mark: list[int]
    candidates: range
    needle: range
    value: range


@dataclass(frozen=True, kw_only=True)
class ProbeStream:
    """A document that holds facts of one form, and a question for each."""

    template: str
    length: int
    document: list[int]
    questions: list[Question]

    @property
    def rows(self) -> int:
        """Tokens of the document with the longest question and answer."""
        return len(self.document) + max(len(q.turn) + len(q.after_mark) for q in self.questions)


class _Fact:
    """A template filled in, as tokens: the same value tokens stand in the statement and after the lead."""

    def __init__(self, template: Template, key: str, rng: random.Random, encode: Callable[[str], list[int]]) -> None:
        self.question = encode("\n" + template.question.format(key=key))
        self.lead = encode(template.lead.format(key=key))
        self.value = encode(" " + template.value(rng))
        statement = encode(" " + template.statement.format(key=key))
        self.sentence = [*statement, *self.value, *encode(".")]
        # Some tokenizers make a space before digits a token of its own; to copy it is no sign of anything.
        blank = int(self.value[:1] == encode(" "))
        self.copied = range(len(statement) + blank, len(statement) + len(self.value))


@dataclass(frozen=True)
class ProbeMaker:
    """Makes probe streams of a model's tokens.

    sink_tokens, tail_tokens: at a stream's two ends, what a reader sees anyway; no candidates.
    """

    tokenizer: TextTokenizer
    chat: ChatFormat
    haystack: Haystack
    sink_tokens: int
    tail_tokens: int

    def streams(self, config: ProbeConfig) -> Iterator[ProbeStream]:
        """The streams of a configuration. Raises ConfigError for a length too short or a haystack too small."""
        for length in config.lengths:
            for template in config.templates:
                for round_ in range(config.rounds):
                    rng = random.Random(f"{config.seed} {template.name} {length} {round_}")
                    yield self.make(template, length, config.depths, rng)

    def make(self, template: Template, length: int, depths: Sequence[float], rng: random.Random) -> ProbeStream:
        """A stream whose questions end at most at `length` tokens. Raises ConfigError."""
        keys: dict[str, None] = {}  # a set that keeps its order
        while len(keys) < len(depths):
            keys.setdefault(template.key(rng))
        facts = [_Fact(template, key, rng, self.tokenizer.encode_continuation) for key in keys]
        turns = [self.chat.prompt_tail(fact.question) for fact in facts]
        room = length - len(self.chat.head) - sum(len(f.sentence) for f in facts) - max(len(turn) for turn, _ in turns)
        hay = self._hay(room, rng)
        document, starts = self._hide([fact.sentence for fact in facts], hay, sorted(depths))
        questions = [
            Question(
                turn=turn,
                after_mark=[*header, *fact.lead, *fact.value],
                candidates=range(self.sink_tokens, len(document) + len(turn) - self.tail_tokens),
                needle=range(start, start + len(fact.sentence)),
                value=range(start + fact.copied.start, start + fact.copied.stop),
            )
            for fact, start, (turn, header) in zip(facts, starts, turns, strict=True)
        ]
        return ProbeStream(template=template.name, length=length, document=document, questions=questions)

    def _hay(self, room: int, rng: random.Random) -> list[list[int]]:
        """Sentences of at most `room` tokens, as many as go in."""
        pieces: list[list[int]] = []
        used = 0
        for sentence in self.haystack.sentences(rng):
            piece = self.tokenizer.encode_continuation(" " + sentence)
            if used + len(piece) > room:
                return pieces
            pieces.append(piece)
            used += len(piece)
        raise ConfigError(
            f"{self.haystack.name} has {used} tokens, and a stream needs {room}: take a longer text or shorter lengths"
        )

    def _hide(
        self, sentences: list[list[int]], hay: list[list[int]], depths: list[float]
    ) -> tuple[list[int], list[int]]:
        """Put each sentence into the gap of the haystack nearest to its depth; the document, and where each starts."""
        gaps = list(accumulate(map(len, hay), initial=0))
        first, last = self.sink_tokens, gaps[-1] - self.tail_tokens
        allowed = [i for i, gap in enumerate(gaps) if first <= gap <= last]
        if not allowed:
            raise ConfigError(
                f"a length leaves no room for facts between {self.sink_tokens} sinks and a tail of {self.tail_tokens}"
                " tokens: take longer lengths or fewer depths"
            )
        document, starts, done = list(self.chat.head), [], 0
        for sentence, depth in zip(sentences, depths, strict=True):
            place = _nearest(gaps, allowed, first + depth * (last - first))
            document += [token for piece in hay[done:place] for token in piece]
            starts.append(len(document))
            document += sentence
            done = place
        return document + [token for piece in hay[done:] for token in piece], starts


def _nearest(values: list[int], indices: list[int], target: float) -> int:
    return min(indices, key=lambda i: abs(values[i] - target))
