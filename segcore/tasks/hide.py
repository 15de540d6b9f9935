"""Facts in a haystack."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from segcore.errors import ConfigError
from segcore.tasks.base import Room, Span, Writer


def hide(
    statements: Sequence[str], depths: Sequence[float], room: Room, tokens: int, rng: random.Random
) -> tuple[str, list[Span]]:
    """A document of at most `tokens` tokens that holds each statement at its depth, and where it does.

    depths: from 0, the document's beginning, to 1, its end; a statement goes to the nearest gap between two sentences.
    One that begins with a line break stands on lines of its own. Raises ConfigError.
    """
    pieces = [text if text.startswith("\n") else f" {text}" for text in statements]
    hay, gaps = _hay(room, tokens - sum(map(room.count, pieces)), rng)
    places = [_nearest(gaps, depth * gaps[-1]) for depth in depths]
    spans, writer, done = [Span(0, 0)] * len(pieces), Writer(), 0
    for i in sorted(range(len(pieces)), key=lambda i: (places[i], i)):
        writer.add("".join(hay[done : places[i]]))
        spans[i], done = writer.add(pieces[i]), places[i]
    writer.add("".join(hay[done:]))
    return trimmed(writer.text, spans)


def trimmed(text: str, spans: Sequence[Span]) -> tuple[str, list[Span]]:
    """A document without white space at its ends, and its spans."""
    cut = len(text) - len(text.lstrip())
    return text.strip(), [Span(start - cut, end - cut) for start, end in spans]


def _hay(room: Room, tokens: int, rng: random.Random) -> tuple[list[str], list[int]]:
    """Sentences of at most so many tokens, as many as go in; tokens before each, and of all."""
    pieces: list[str] = []
    counts: list[int] = []
    left = tokens
    for sentence in room.haystack.sentences(rng):
        piece = f" {sentence}"
        count = room.count(piece)
        if count > left:
            if not pieces:
                break
            return pieces, list(accumulate(counts, initial=0))
        pieces.append(piece)
        counts.append(count)
        left -= count
    if not pieces:
        raise ConfigError(f"{room.length} tokens leave no room for a haystack: take longer lengths or fewer facts")
    raise ConfigError(
        f"{room.haystack.name} has {sum(counts)} tokens, and an item needs {tokens}: take a longer text or shorter"
        " lengths"
    )


def _nearest(values: Sequence[int], target: float) -> int:
    """The index of the nearest of ascending values."""
    i = bisect_left(values, target)
    return min((j for j in (i - 1, i) if 0 <= j < len(values)), key=lambda j: abs(values[j] - target))
