"""What a form of facts is: how it is said, and how it is asked about."""

from __future__ import annotations

from dataclasses import dataclass

from segcore.tasks.split import Split


@dataclass(frozen=True)
class Form:
    """One form of a fact about a key.

    key, value: kinds of `segcore.tasks.words`. statement: with {key} and {value}; one that begins with a line break
    stands on lines of its own. questions: with {key}. answer: with both. many: the question for several keys or values,
    with {key}; "" where nobody would ask so.
    """

    name: str
    key: str
    value: str
    statement: str
    questions: tuple[str, ...]
    answer: str
    many: str = ""

    @property
    def lead(self) -> str:
        """The answer up to its value; "" if it begins with it."""
        return self.answer.partition("{value}")[0].rstrip()


# What may stand around a question, and whether the answer is then the bare value.
FRAMES: dict[Split, tuple[tuple[str, bool], ...]] = {
    "train": (
        ("{question}", False),
        ("{question} Answer in one sentence.", False),
        ("{question} Reply with the answer alone.", True),
        ("Use the text above to answer. {question}", False),
        ("Short answer, please: {question}", True),
        ("I read this a while ago and forgot one thing. {question}", False),
        ("Question: {question}\nGive nothing but the answer.", True),
        ("Somewhere in there is a detail I need. {question}", False),
    ),
    "eval": (
        ("{question}", False),
        ("Going by the document: {question}", False),
        ("{question} No explanation.", True),
        ("Could you look this up for me? {question}", False),
    ),
}
