"""`full`: every token sees everything, at its own position. The baseline; its memory grows with the stream."""

from __future__ import annotations

from segcore.pastkv.manager import SessionPast
from segcore.policies.base import Policy
from segcore.state import State, Window


class FullPolicy(Policy):
    name = "full"

    @property
    def max_stream_tokens(self) -> int | None:
        return self.spec.max_positions

    def begin(self) -> State:
        heads, rows = tuple(range(self.spec.kv_heads)), self.config.segment_tokens
        return State(
            [[Window.allocate(heads, rows, 0, self.like, self.spec.head_dim)] for _ in range(self.spec.layers)]
        )

    def close(self, state: State, past: SessionPast) -> None:
        for (window,) in state.layers:
            window.base += state.filled
            window.start = 0
            window.grow(window.base + self.config.segment_tokens)
        state.filled = 0

    def refresh(self, state: State, past: SessionPast) -> None:
        """Nothing to choose: everything is seen."""
