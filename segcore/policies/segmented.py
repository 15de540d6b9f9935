"""`segmented`: sinks, a carried tail and retrieved tokens before a segment (design, sections 3 to 6; arXiv 2605.11744).

Ours differs from the paper in that one selection serves all readers (`global`), every cell has sinks and a tail, and
a turn mark refreshes the selection inside a segment; `docs/architecture.md` says why.
"""

from __future__ import annotations

import torch
from torch import Tensor

from segcore.config import Cell, SegmentConfig
from segcore.errors import ConfigError
from segcore.model import ModelSpec, Rope
from segcore.pastkv.base import PastLayout
from segcore.pastkv.manager import SessionPast
from segcore.policies.base import Policy
from segcore.retrieval import choose_blocks, score_tokens
from segcore.state import State, Window


class SegmentedPolicy(Policy):
    name = "segmented"

    def __init__(self, config: SegmentConfig, spec: ModelSpec, rope: Rope) -> None:
        super().__init__(config, spec, rope)
        if config.retrieved_tokens and not config.selectors:
            raise ConfigError(
                f"policy 'segmented' needs the selector cells of {spec.architecture}: find them with `segcore heads`,"
                " set retrieved_tokens=0 to run without retrieval, or choose policy 'full'"
            )
        if config.prefix_tokens + config.segment_tokens > spec.max_positions:
            raise ConfigError(
                f"prefix and segment take {config.prefix_tokens + config.segment_tokens} positions, and"
                f" {spec.architecture} was trained on {spec.max_positions}; lower segment_tokens"
            )
        every = tuple(Cell(layer, head) for layer in range(spec.layers) for head in range(spec.kv_heads))
        self.readers = every if config.readers is None else tuple(sorted(set(config.readers)))
        if not config.retrieved_tokens:
            self.readers = ()
        self._column = {cell: i for i, cell in enumerate(self.readers)}

    @property
    def watched(self) -> tuple[Cell, ...]:
        return self.config.selectors if self.readers else ()

    @property
    def layout(self) -> PastLayout | None:
        if not self.readers:
            return None
        return PastLayout(
            segment_tokens=self.config.segment_tokens,
            cells=len(self.readers),
            selectors=len(self.config.selectors),
            head_dim=self.spec.head_dim,
            dtype=self.spec.dtype,
        )

    def begin(self) -> State:
        rows, base = self.config.prefix_tokens + self.config.segment_tokens, self.config.prefix_tokens
        layers = []
        for layer in range(self.spec.layers):
            heads = range(self.spec.kv_heads)
            reading = tuple(h for h in heads if Cell(layer, h) in self._column)
            local = tuple(h for h in heads if Cell(layer, h) not in self._column)
            groups = [group for group in (reading, local) if group]
            layers.append([Window.allocate(g, rows, base, self.like, self.spec.head_dim) for g in groups])
        return State(layers)

    def close(self, state: State, past: SessionPast) -> None:
        if self.readers:
            self._append(state, past)
        seen_before = state.length - state.filled
        for layer, windows in enumerate(state.layers):
            for window in windows:
                self._carry_tail(window, self._tail_tokens(layer, window), seen_before, state.filled)
        state.filled = 0
        self.refresh(state, past)

    def refresh(self, state: State, past: SessionPast) -> None:
        closed = state.length - state.filled
        if not self.readers or closed == 0:
            return
        state.retrieved_R = self._choose(state, past, closed)
        kv_RC2D = past.gather(state.retrieved_R).to(self.spec.device)
        for layer, windows in enumerate(state.layers):
            for window in windows:
                if self._reads(layer, window):
                    columns = [self._column[Cell(layer, head)] for head in window.heads]
                    k_RHD, v_RHD = kv_RC2D[:, columns].unbind(dim=2)
                    self._insert_retrieved(window, closed, k_RHD.transpose(0, 1), v_RHD.transpose(0, 1))

    def _reads(self, layer: int, window: Window) -> bool:
        return Cell(layer, window.heads[0]) in self._column

    def _tail_tokens(self, layer: int, window: Window) -> int:
        return self.config.reader_tail_tokens if self._reads(layer, window) else self.config.tail_tokens

    def _sinks_and_tail(self, closed: int, tail_tokens: int) -> tuple[int, int]:
        """How many sinks and tail tokens a cell holds after `closed` tokens; no token is both."""
        sinks = min(self.config.sink_tokens, closed)
        return sinks, min(tail_tokens, closed - sinks)

    def _append(self, state: State, past: SessionPast) -> None:
        """Hand the full segment's keys and values of the readers, and the selectors' keys, to past KV."""
        kv_SC2D = self.like.new_empty((state.filled, len(self.readers), 2, self.spec.head_dim))
        selector_keys = {}
        for layer, windows in enumerate(state.layers):
            for window in windows:
                rows = slice(window.base, window.base + state.filled)
                for i, head in enumerate(window.heads):
                    cell = Cell(layer, head)
                    if cell in self._column:
                        kv_SC2D[:, self._column[cell], 0] = window.k_HND[i, rows]
                        kv_SC2D[:, self._column[cell], 1] = window.v_HND[i, rows]
                    if cell in self.config.selectors:
                        selector_keys[cell] = window.k_HND[i, rows]
        past.append(kv_SC2D, torch.stack([selector_keys[cell] for cell in self.config.selectors]))

    def _carry_tail(self, window: Window, tail_tokens: int, seen_before: int, filled: int) -> None:
        """Make the last tokens of [old tail | segment] the tail, and keep the stream's first tokens as sinks."""
        sinks, tail = self._sinks_and_tail(seen_before + filled, tail_tokens)
        # In the first segment the sinks stand at its head; later they lead the prefix.
        sink_row = window.base if seen_before == 0 else window.start
        tail_row = window.base + filled - tail
        rows = torch.cat([torch.arange(sink_row, sink_row + sinks), torch.arange(tail_row, tail_row + tail)])
        self._write_prefix(window, window.k_HND[:, rows], window.v_HND[:, rows])

    def _insert_retrieved(self, window: Window, closed: int, k_HRD: Tensor, v_HRD: Tensor) -> None:
        """Replace the retrieved tokens between sinks and tail."""
        sinks, tail = self._sinks_and_tail(closed, self.config.reader_tail_tokens)
        head, end = slice(window.start, window.start + sinks), slice(window.base - tail, window.base)
        k = torch.cat([window.k_HND[:, head], k_HRD, window.k_HND[:, end]], dim=1)
        v = torch.cat([window.v_HND[:, head], v_HRD, window.v_HND[:, end]], dim=1)
        self._write_prefix(window, k, v)

    def _write_prefix(self, window: Window, k_HTD: Tensor, v_HTD: Tensor) -> None:
        """Right-align a prefix before the segment and rotate its keys to their rows."""
        window.start = window.base - k_HTD.shape[1]
        window.write(window.start, k_HTD, self.rope.keys(k_HTD, window.start), v_HTD)

    def _choose(self, state: State, past: SessionPast, closed: int) -> Tensor:
        scores_N = score_tokens(state.queries, past.selector_keys(), self.spec.head_dim**-0.5)
        sinks, tail = self._sinks_and_tail(closed, self.config.reader_tail_tokens)
        return choose_blocks(
            scores_N,
            first=sinks,
            stop=closed - tail,
            tokens=self.config.retrieved_tokens,
            block=self.config.block_tokens,
        )
