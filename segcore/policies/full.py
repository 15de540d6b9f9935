"""`full`: every token sees everything, at its own position. The baseline; its memory grows with the stream."""

from __future__ import annotations

from segcore.config import FullConfig
from segcore.pastkv.session import SessionPast
from segcore.policies.base import Policy
from segcore.state import State, Window


class FullPolicy(Policy[FullConfig]):
    original_positions = True
    bounded = False

    def windows(self, layer: int) -> list[Window]:
        return [self._window(range(self.spec.kv_heads))]

    def close(self, state: State, past: SessionPast) -> None:
        for (window,) in state.layers:
            window.extend(state.filled)
        state.filled = 0
