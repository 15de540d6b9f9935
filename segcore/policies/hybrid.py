"""What the policies share whose cells see either everything or a fixed pattern, all at original positions.

The pattern is a function of positions alone and moves by whole segments, as in chunked prefill: query t of the segment
that starts at s sees token j if s <= j <= t, if s - window_tokens <= j < s, or if j < s is of the pattern's fixed part.
A fixed part never loses a token, so what the next prefix needs is always in the last one or in the segment.

Shape: N tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

from segcore.config import Cell, DuoConfig, LongGenConfig
from segcore.model import ModelSpec, Rope
from segcore.pastkv.session import SessionPast
from segcore.policies.base import Policy
from segcore.state import State, Window

C = TypeVar("C", bound=DuoConfig | LongGenConfig)


class HybridPolicy(Policy[C]):
    """Dense cells see everything, sparse ones the pattern; the fixed part is the sinks, or what a subclass says."""

    original_positions = True
    bounded = False

    def __init__(self, config: C, spec: ModelSpec, rope: Rope, dense: Iterable[Cell]) -> None:
        super().__init__(config, spec, rope)
        self._dense = frozenset(dense)
        self._require_cells(self._dense)

    def fixed(self, positions_N: Tensor) -> Tensor:
        """Which stream positions sparse cells see however old they are: a mask, [N]."""
        return positions_N < self.config.sink_tokens

    def windows(self, layer: int) -> list[Window]:
        """The dense cells' window, then the sparse ones'; the latter has room for what doesn't grow."""
        dense, sparse = self._split(layer, self._dense)
        room = self.config.sink_tokens + self.config.window_tokens
        return [self._window(heads, prefix=rows) for heads, rows in ((dense, 0), (sparse, room)) if heads]

    def close(self, state: State, past: SessionPast) -> None:
        segment = torch.arange(state.closed, state.length, device=self.spec.device)
        held_N = torch.cat([self._prefix(state.closed), segment])
        rows = torch.searchsorted(held_N, self._prefix(state.length))
        for layer, windows in enumerate(state.layers):
            for window in windows:
                if Cell(layer, window.heads[0]) in self._dense:
                    window.extend(state.filled)
                else:
                    window.keep(window.start + rows, position=state.length)
        state.filled = 0

    def _prefix(self, start: int) -> Tensor:
        """The stream positions, ascending, that sparse cells see before a segment that starts at `start`."""
        positions_N = torch.arange(start, device=self.spec.device)
        return positions_N[self.fixed(positions_N) | (positions_N >= start - self.config.window_tokens)]
