"""A stream known by its tokens alone, as a journal: what has been asked of an engine decides its passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from segcore.config import EngineConfig
from segcore.pastkv.journal import Journal, position
from segcore.segments import tokens_to_next_cut


def journal_of(tokens: Sequence[int], stops: Iterable[int], config: EngineConfig) -> Journal:
    """The journal of an engine that was given these tokens and has run all it could.

    stops: positions, ascending, at which something was asked for: p, where a flush or a generation waited for the
    tokens before it, or a token of an answer began; ~p, where a turn was marked. Passes end there and where the stream
    is cut anyhow, so when the tokens came doesn't matter. Tokens after the last pass aren't in the journal.
    """
    segment, at, events = config.segment, 0, list[int]()
    size = segment.segment_tokens

    def run_to(end: int, *, partly: bool) -> None:
        nonlocal at
        while at < end:
            cut = at + tokens_to_next_cut(at % size, segment, config.chunk_tokens)
            if cut > end and not partly:
                return
            at = min(cut, end)
            events.append(at)

    for stop in stops:
        run_to(position(stop), partly=True)
        if stop < 0:
            events.append(stop)
    run_to(len(tokens), partly=False)
    return Journal(tokens[:at], events)


def block_keys(journal: Journal, root: str, segment_tokens: int) -> list[str]:
    """The keys of the closed segments, in stream order."""
    keys, last = list[str](), root
    for first in range(0, len(journal.tokens) // segment_tokens * segment_tokens, segment_tokens):
        last = journal.key(last, first, first + segment_tokens)
        keys.append(last)
    return keys
