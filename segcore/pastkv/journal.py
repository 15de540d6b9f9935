"""The durable truth of a stream: its tokens, where forward passes ended, and where turns were marked.

Whatever else is lost, running the same passes over the same tokens brings it back, bit for bit on the same machine.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from hashlib import blake2b

from segcore.state import State

KEY_BYTES = 20


class Journal:
    """Tokens and events of a stream. An event is a pass, written as its end, or a mark, as ~position; both ascend."""

    def __init__(self, tokens: Sequence[int] = (), events: Sequence[int] = ()) -> None:
        self.tokens, self.events = array("i", tokens), array("q", events)

    def copy(self) -> Journal:
        return Journal(self.tokens, self.events)

    def next_event(self, state: State) -> int | None:
        """What happened next when the stream first passed through `state`; None if this is where it stands."""
        return self.events[state.events] if state.events < len(self.events) else None

    def tokens_to(self, state: State, end: int) -> list[int]:
        """The tokens from `state` to position `end`."""
        return self.tokens[state.length : end].tolist()

    def begin_pass(self, state: State, tokens: Sequence[int]) -> None:
        """A pass over `tokens` begins: a new event, or the one that happened here before."""
        end = state.length + len(tokens)
        if self.next_event(state) is None:
            self.tokens.extend(tokens)
            self.events.append(end)
        assert self.next_event(state) == end, "a replayed pass must end where it ended"
        assert self.tokens_to(state, end) == list(tokens), "a replayed pass must run the same tokens"
        state.events += 1

    def begin_mark(self, state: State) -> None:
        """A turn is marked here: a new event, or the one that happened here before."""
        if self.next_event(state) is None:
            self.events.append(~state.length)
        assert self.next_event(state) == ~state.length, "a replayed mark must stand where it stood"
        state.events += 1

    def events_until(self, boundary: int) -> int:
        """How many events led to the closing of the segment that ends at `boundary`."""
        if boundary == 0:
            return 0
        # The pass that ended there comes before any mark there.
        return bisect_left(self.events, boundary, key=position) + 1

    def truncate(self, boundary: int) -> None:
        """Forget everything after the closing of the segment that ends at `boundary`."""
        del self.events[self.events_until(boundary) :]
        del self.tokens[boundary:]

    def extend(self, tokens: Sequence[int], ends: Sequence[int]) -> None:
        """Passes over `tokens`, ending at `ends`, that another stream ran for this one."""
        self.tokens.extend(tokens)
        self.events.extend(ends)

    def key(self, previous: str, first: int, stop: int, tokens: Sequence[int] = (), ends: Sequence[int] = ()) -> str:
        """The key of the segment [first, stop) after the one whose key is `previous`.

        Where passes ended and turns were marked is part of it, since the last bits of keys and values depend on it.
        tokens, ends: what would follow what the journal holds.
        """
        last = self.events_until(stop) if not ends else len(self.events)
        events = [e - first if e >= 0 else e + first for e in (*self.events[self.events_until(first) : last], *ends)]
        digest = blake2b(previous.encode(), digest_size=KEY_BYTES)
        for values in (array("q", [*self.tokens[first:stop], *tokens]), array("q", events)):
            digest.update(len(values).to_bytes(8, "little") + values.tobytes())
        return digest.hexdigest()


def position(event: int) -> int:
    """Where in the stream an event stands."""
    return event if event >= 0 else ~event


def root_key(fingerprint: str, tenant: str) -> str:
    """The key before a stream's first segment: streams of different models or tenants share nothing."""
    return blake2b(f"{fingerprint}\0{tenant}".encode(), digest_size=KEY_BYTES).hexdigest()
