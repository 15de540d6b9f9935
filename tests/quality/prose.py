"""Prose without an end: plain sentences from a small grammar, to hide needles in. Deterministic by seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

_PEOPLE = [
    "the baker",
    "an old sailor",
    "my neighbour",
    "the schoolteacher",
    "a young doctor",
    "the gardener",
    "her aunt",
]
_DEEDS = [
    "walked along the harbour",
    "mended the wooden gate",
    "told a story about the war",
    "waited for the evening train",
    "carried bread to the market",
    "painted the kitchen a pale yellow",
    "wrote a long letter to a friend",
    "listened to the rain on the roof",
    "planted beans behind the house",
]
_WHEN = ["in the morning", "after supper", "when the bells rang", "on the first warm day of spring", "before the storm"]
_THOUGHTS = [
    "Nobody in the village thought much of it at the time.",
    "It was the kind of day that people remember without knowing why.",
    "There is a lesson in this, though it takes years to learn it.",
    "The road to the mill had been closed since the flood.",
    "What matters in such work is patience more than strength.",
    "They spoke of the weather, as people do when they have little to say.",
    "Most of what is worth doing looks foolish when it is begun.",
    "The harvest had been good, and the barns were full.",
]


def sentences(seed: int) -> Iterator[str]:
    """Sentences without end."""
    rng = random.Random(seed)
    while True:
        if rng.random() < 0.4:
            yield rng.choice(_THOUGHTS)
        else:
            who, deed, when = rng.choice(_PEOPLE), rng.choice(_DEEDS), rng.choice(_WHEN)
            yield f"{when.capitalize()} {who} {deed}." if rng.random() < 0.5 else f"{who.capitalize()} {deed} {when}."
