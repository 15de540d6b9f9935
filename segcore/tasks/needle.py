"""Needles: facts of many forms in a haystack, as in RULER (arXiv 2404.06654), whose form is one of ours."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from segcore.errors import ConfigError
from segcore.tasks.base import Item, Room, Turn, listed, rng_of
from segcore.tasks.forms import FORMS, FRAMES, Form, compose
from segcore.tasks.hide import hide
from segcore.tasks.words import Source


@dataclass(frozen=True)
class _Fact:
    """What a text says of a key, in as many statements as there are values."""

    form: Form
    key: str
    values: tuple[str, ...]

    @property
    def statements(self) -> list[str]:
        return [self.form.statement.format(key=self.key, value=value) for value in self.values]


@dataclass(frozen=True, kw_only=True)
class Needle:
    """keys: facts that are hidden of each form; those that aren't asked for distract. values: of each key, to be named
    all. queries: keys that a question asks for at once. turns: questions, each for other facts while there are. mixed:
    forms in a document.

    depth: where the first question's facts stand, from 0 to 1; None: anywhere. forms: by name; empty: all of the
    split's. Another split's may be named; names, values and haystack stay apart all the same. composed: forms are put
    together anew for each document, to train on; they say different things of the same keys.
    """

    name: ClassVar[str] = "needle"
    keys: int = 1
    values: int = 1
    queries: int = 1
    turns: int = 1
    mixed: int = 1
    depth: float | None = None
    forms: tuple[str, ...] = ()
    composed: bool = field(default=False, repr=False)  # what is drawn for a seed is older than this option

    def __post_init__(self) -> None:
        if min(self.keys, self.values, self.queries, self.turns, self.mixed) < 1:
            raise ConfigError("needle: keys, values, queries, turns and mixed must be at least 1")
        if self.queries > self.keys:
            raise ConfigError(f"needle: {self.queries} queries need as many keys, not {self.keys}")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ConfigError(f"needle: depth={self.depth} must lie between 0 and 1")
        if self.composed and (self.forms or max(self.values, self.queries) > 1):
            raise ConfigError("needle: composed forms have no names, and are asked for one key and one value at a time")
        if unknown := set(self.forms) - set(_BY_NAME):
            raise ConfigError(f"needle: no form {', '.join(sorted(unknown))}; known: {', '.join(_BY_NAME)}")

    def make(self, room: Room, seed: str) -> Item:
        rng = rng_of(f"{self}", room, seed)
        facts = self._facts(Source(rng, room.split))
        asked: list[list[_Fact]] = []
        for _ in range(self.turns):
            asked.append(self._asked(facts, asked, rng))
        frames = [rng.choice(FRAMES[room.split]) for _ in asked]
        drafts = [_turn(group, *frame, rng) for group, frame in zip(asked, frames, strict=True)]
        placed = [(fact, statement) for fact in facts for statement in fact.statements]
        depths = [depth for fact in facts for depth in self._depths(fact, asked[0], rng)]
        document, spans = hide([text for _, text in placed], depths, room, room.for_document(drafts), rng)
        where = {id(fact): [span for (f, _), span in zip(placed, spans, strict=True) if f is fact] for fact in facts}
        turns = tuple(
            replace(draft, needed=tuple(sorted(span for fact in group for span in where[id(fact)])))
            for draft, group in zip(drafts, asked, strict=True)
        )
        told = {"form": asked[0][0].form.name, "keys": self.keys, "depth": turns[0].needed[0].start / len(document)}
        return Item(name=f"{self.name} {seed}", task=self.name, document=document, turns=turns, facts=told)

    def _facts(self, source: Source) -> list[_Fact]:
        keys: dict[str, list[str]] = {}
        facts = []
        for form in self._drawn(source):
            if not self.composed or form.key not in keys:
                keys[form.key] = source.different(form.key, self.keys)
            facts += [_Fact(form, key, tuple(source.different(form.value, self.values))) for key in keys[form.key]]
        return facts

    def _drawn(self, source: Source) -> list[Form]:
        if self.composed:
            if source.split != "train":
                raise ConfigError("needle: composed forms are for training alone")
            return compose(source.rng, self.mixed)
        usable = [_BY_NAME[name] for name in self.forms] or list(FORMS[source.split])
        if max(self.values, self.queries) > 1:
            usable = [form for form in usable if form.many]
        if len(usable) < self.mixed:
            raise ConfigError(f"needle: {self.mixed} forms are mixed, and {len(usable)} can be")
        return source.rng.sample(usable, self.mixed)

    def _asked(self, facts: Sequence[_Fact], before: Sequence[Sequence[_Fact]], rng: random.Random) -> list[_Fact]:
        """Facts of one form: what was told before is to be read in the turns, and no longer in the document."""
        left = [fact for fact in facts if not any(fact is other for group in before for other in group)]
        usable = [fact for fact in left if sum(other.form is fact.form for other in left) >= self.queries] or facts
        form = rng.choice(usable).form
        return rng.sample([fact for fact in usable if fact.form is form], self.queries)

    def _depths(self, fact: _Fact, first: Sequence[_Fact], rng: random.Random) -> list[float]:
        """Of its statements, which stand in the order of its values."""
        anywhere = sorted(rng.random() for _ in fact.values)
        fixed = self.depth is not None and any(fact is other for other in first)
        return [self.depth or 0.0 for _ in fact.values] if fixed else anywhere


def _turn(facts: Sequence[_Fact], frame: str, bare: bool, rng: random.Random) -> Turn:
    form, keys = facts[0].form, listed([fact.key for fact in facts])
    values = [value for fact in facts for value in fact.values]
    question = form.many if len(values) > 1 else rng.choice(form.questions)
    said = listed(values)
    return Turn(
        question=frame.format(question=question.format(key=keys)),
        answer=said if bare else form.answer.format(key=keys, value=said),
        expected=tuple(values),
        lead="" if bare else form.lead.format(key=keys),
    )


_BY_NAME = {form.name: form for forms in FORMS.values() for form in forms}
