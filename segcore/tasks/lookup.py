"""Key-value lookup: a document that is nothing but entries that look alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from segcore.errors import ConfigError
from segcore.tasks.base import Item, Room, Span, Turn, Writer, rng_of
from segcore.tasks.split import Split
from segcore.tasks.words import Source


@dataclass(frozen=True)
class _Layout:
    """key, value: kinds of `segcore.tasks.words`. entry: with both."""

    key: str
    value: str
    head: str
    entry: str
    question: str
    answer: str


_LAYOUTS: dict[Split, tuple[_Layout, ...]] = {
    "train": (
        _Layout(
            "numbered pair",
            "digits6",
            "",
            "\n{key}: {value}",
            "What is the value of {key}?",
            "The value of {key} is {value}.",
        ),
        _Layout("hex", "hex", "", '\n"{key}": "{value}",', 'Which value does the key "{key}" have?', "{value}"),
        _Layout(
            "person",
            "phone",
            "name,phone",
            "\n{key},{value}",
            "What is the phone number of {key}?",
            "The phone number of {key} is {value}.",
        ),
        _Layout(
            "code",
            "described",
            "Inventory\n",
            "\n| {key} | {value} |",
            "What is stored under {key}?",
            "Stored under {key}: {value}.",
        ),
        _Layout(
            "uuid", "uuid", "", '\n{{"key": "{key}", "value": "{value}"}}', "Extract the value of {key}.", "{value}"
        ),
    ),
    "eval": (
        _Layout(
            "plate",
            "person",
            "Keepers of the vehicles.",
            " {key} is kept by {value};",
            "Who keeps the vehicle {key}?",
            "The keeper of {key} is {value}.",
        ),
        _Layout(
            "coded",
            "count",
            "<prices>",
            '\n<item sku="{key}">{value}</item>',
            "Give me the price of sku {key}.",
            "The price of {key} is {value}.",
        ),
        _Layout(
            "antique",
            "date",
            "",
            "\n[{value}] sold: {key}",
            "On which date was the {key} sold?",
            "The {key} was sold on {value}.",
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """turns: questions, each for another entry. depth: where the first one's entry stands; None: anywhere.

    classic: a layout of the training's, in whichever split: keys of two words and a number, values of six digits.
    """

    name: ClassVar[str] = "lookup"
    turns: int = 1
    depth: float | None = None
    classic: bool = False

    def __post_init__(self) -> None:
        if self.turns < 1 or not (self.depth is None or 0 <= self.depth <= 1):
            raise ConfigError("lookup: turns must be at least 1, and depth between 0 and 1")

    def make(self, room: Room, seed: str) -> Item:
        rng = rng_of(f"{self}", room, seed)
        source, layouts = Source(rng, room.split), _LAYOUTS[room.split]
        layout = _LAYOUTS["train"][0] if self.classic else rng.choice(layouts)
        # Room for questions about keys like these; they are known only when the document is full.
        samples = [_turn(layout, source.draw(layout.key), source.draw(layout.value), Span(0, 0)) for _ in range(4)]
        costs = sorted(room.length - room.frame_tokens - room.for_document([sample]) for sample in samples)
        left = room.length - room.frame_tokens - self.turns * (costs[-1] + 4) - room.count(layout.head)
        entries = _entries(layout, source, room, left)
        if len(entries) < self.turns:
            raise ConfigError(f"lookup: {room.length} tokens are too few for {self.turns} questions")
        writer, spans = Writer(layout.head), {}
        for key, value in entries.items():
            spans[key] = writer.add(layout.entry.format(key=key, value=value))
        cut = len(writer.text) - len(writer.text.lstrip())
        keys = list(entries)
        asked = rng.sample(keys, self.turns)
        if self.depth is not None:
            first = keys[round(self.depth * (len(keys) - 1))]
            asked = [first, *[key for key in asked if key != first]][: self.turns]
        where = {key: Span(spans[key].start - cut, spans[key].end - cut) for key in asked}
        turns = tuple(_turn(layout, key, entries[key], where[key]) for key in asked)
        document = writer.text.strip()
        told = {"form": layout.key, "entries": len(keys), "depth": turns[0].needed[0].start / len(document)}
        return Item(name=f"{self.name} {seed}", task=self.name, document=document, turns=turns, facts=told)


def _entries(layout: _Layout, source: Source, room: Room, tokens: int) -> dict[str, str]:
    """As many entries as so many tokens hold. Raises ConfigError if there aren't as many names."""
    entries: dict[str, str] = {}
    while True:
        key = source.different(layout.key, 1, entries)[0]
        value = source.draw(layout.value)
        tokens -= room.count(layout.entry.format(key=key, value=value))
        if tokens < 0:
            return entries
        entries[key] = value


def _turn(layout: _Layout, key: str, value: str, span: Span) -> Turn:
    return Turn(
        question=layout.question.format(key=key),
        answer=layout.answer.format(key=key, value=value),
        expected=(value,),
        lead=layout.answer.partition("{value}")[0].format(key=key).rstrip(),
        needed=(span,),
    )
