"""Variable tracking: chains of assignments in a haystack; the question asks for all that end at one value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

from segcore.errors import ConfigError
from segcore.tasks.base import Item, Room, Turn, listed, rng_of
from segcore.tasks.hide import hide
from segcore.tasks.split import Split
from segcore.tasks.words import Source


@dataclass(frozen=True)
class _Form:
    """first: with {name} and {value}. link: with {name} and {old}. name, value: kinds of `segcore.tasks.words`."""

    name: str
    value: str
    first: str
    link: str
    question: str
    answer: str


_FORMS: dict[Split, tuple[_Form, ...]] = {
    "train": (
        _Form(
            "variable",
            "digits5",
            "VAR {name} = {value}.",
            "VAR {name} = VAR {old}.",
            "Find all variables that are assigned the value {value} in the text above.",
            "The variables that are assigned the value {value} are: {names}.",
        ),
        _Form(
            "pair",
            "digits6",
            "\nlet {name} := {value};\n",
            "\nlet {name} := {old};\n",
            "Which names stand for {value}, directly or through another name?",
            "The names that stand for {value} are: {names}.",
        ),
        _Form(
            "person",
            "price",
            "{name} holds the note over {value} crowns.",
            "{name} took over the note that {old} held.",
            "Who has held the note over {value} crowns, first and later?",
            "The note over {value} crowns was held by {names}.",
        ),
    ),
    "eval": (
        _Form(
            "coded",
            "count",
            "Crate {name} is stamped with lot {value}.",
            "Crate {name} carries the same stamp as crate {old}.",
            "Name every crate of lot {value}.",
            "The crates of lot {value} are: {names}.",
        ),
        _Form(
            "house",
            "version",
            "\n{name} runs firmware {value}\n",
            "\n{name}: cloned from {old}\n",
            "Which sites run firmware {value}, clones included?",
            "Firmware {value} runs at {names}.",
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """chains: of assignments, of which one is asked for in each turn. hops: assignments after a chain's first.

    classic: RULER's form, in whichever split.
    """

    name: ClassVar[str] = "tracking"
    chains: int = 1
    hops: int = 4
    turns: int = 1
    classic: bool = False

    def __post_init__(self) -> None:
        if self.chains < self.turns or self.turns < 1 or self.hops < 0:
            raise ConfigError("tracking: turns must be at least 1 and at most chains, and hops at least 0")

    def make(self, room: Room, seed: str) -> Item:
        rng = rng_of(f"{self}", room, seed)
        source, form = Source(rng, room.split), _FORMS["train"][0] if self.classic else rng.choice(_FORMS[room.split])
        size = self.hops + 1
        names = source.different(form.name, self.chains * size)
        chains = [names[i : i + size] for i in range(0, len(names), size)]
        values = source.different(form.value, self.chains)
        drafts = [
            Turn(
                question=form.question.format(value=value),
                answer=form.answer.format(value=value, names=listed(chain)),
                expected=tuple(chain),
                lead=form.answer.partition("{names}")[0].format(value=value).rstrip(),
            )
            for chain, value in list(zip(chains, values, strict=True))[: self.turns]
        ]
        statements = [text for c, v in zip(chains, values, strict=True) for text in _statements(form, c, v)]
        depths = [depth for _ in chains for depth in sorted(rng.random() for _ in range(size))]
        document, spans = hide(statements, depths, room, room.for_document(drafts), rng)
        turns = tuple(replace(d, needed=tuple(spans[i * size : (i + 1) * size])) for i, d in enumerate(drafts))
        told = {"form": form.name, "hops": self.hops, "chains": self.chains}
        return Item(name=f"{self.name} {seed}", task=self.name, document=document, turns=turns, facts=told)


def _statements(form: _Form, chain: list[str], value: str) -> list[str]:
    links = [form.link.format(name=new, old=old) for old, new in pairwise(chain)]
    return [form.first.format(name=chain[0], value=value), *links]
