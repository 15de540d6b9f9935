"""How answers are judged: each metric lies between 0 and 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from segcore.tasks.base import Match

Metric = Callable[[str, Sequence[str], Match], float]


def match(answer: str, expected: Sequence[str], mode: Match) -> float:
    """RULER's: the share of the expected texts that occur in the answer, or whether any does; case is ignored."""
    held = [text.lower() in answer.lower() for text in expected]
    return float(any(held)) if mode == "any" else sum(held) / max(1, len(held))


def exact(answer: str, expected: Sequence[str], mode: Match) -> float:
    """SQuAD's: the answer is an expected text, but for case, punctuation, articles and white space; of several that
    are all expected, none may be missing, and the answer may hold nothing else but words that join them."""
    if mode == "any":
        return float(any(_normal(answer) == _normal(text) for text in expected))
    rest = f" {_normal(answer)} "
    for text in expected:
        if f" {_normal(text)} " not in rest:
            return 0.0
        rest = rest.replace(f" {_normal(text)} ", " ", 1)
    return float(not set(rest.split()) - {"and"})


def f1(answer: str, expected: Sequence[str], mode: Match) -> float:
    """SQuAD's: overlap of words, with the best of the expected texts, or with all of them together."""
    texts = expected if mode == "any" else [" ".join(expected)]
    return max((_overlap(_normal(answer).split(), _normal(text).split()) for text in texts), default=0.0)


METRICS: dict[str, Metric] = {"match": match, "exact": exact, "f1": f1}


def _normal(text: str) -> str:
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _overlap(found: Sequence[str], wanted: Sequence[str]) -> float:
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0
