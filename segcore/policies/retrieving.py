"""What the policies that retrieve share: a prefix of sinks, retrieved tokens and a tail, from past KV.

Shapes: C choices or cells, R retrieved tokens, S tokens of a segment, H KV heads, D head dimension.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from segcore.config import Cell, RetrievalConfig
from segcore.model import ModelSpec, Rope
from segcore.pastkv.base import PastLayout
from segcore.pastkv.session import SessionPast
from segcore.policies.base import Policy, sink_and_tail_rows, sinks_and_tail, write_prefix
from segcore.retrieval import KeyIndex
from segcore.state import State, Window

C = TypeVar("C", bound=RetrievalConfig)


class RetrievingPolicy(Policy[C]):
    """Reader cells see [sinks, retrieved, tail]; a subclass chooses, and says what other cells see.

    readers: the cells that read, ascending; their keys and values go to past KV.
    """

    def __init__(self, config: C, spec: ModelSpec, rope: Rope, readers: set[Cell]) -> None:
        super().__init__(config, spec, rope)
        self._require_cells((*config.selectors, *readers))
        self._require_positions(config.prefix_tokens + config.segment_tokens)
        self.readers = tuple(sorted(readers)) if config.retrieved_tokens else ()
        self._column = {cell: i for i, cell in enumerate(self.readers)}

    @abstractmethod
    def searched(self, state: State) -> dict[str, Tensor]:
        """What `choose` will need of the full segment; for `SessionPast.search`, "keys", [selectors, S, D]."""

    @abstractmethod
    def choose(self, state: State, past: SessionPast, first: int, stop: int) -> Tensor:
        """Positions in [first, stop), ascending: the retrieved prefix, [1, R] for all readers or [readers, R]."""

    @property
    def new_search(self) -> Callable[[], KeyIndex] | None:
        """Makes what the selectors' keys are searched with; None: `choose` goes through `SessionPast.index`."""
        return None

    def seen_by_others(self, cell: Cell) -> tuple[int, int]:
        """How many sinks, and how many tokens before the segment, a cell that doesn't read sees."""
        return self.config.sink_tokens, self.config.reader_tail_tokens

    @property
    def watched_tokens(self) -> int:
        return self.config.query_window_tokens

    @property
    def layout(self) -> PastLayout | None:
        if not self.readers:
            return None
        return PastLayout(
            segment_tokens=self.config.segment_tokens,
            cells=len(self.readers),
            selectors=len(self.watched),
            head_dim=self.spec.head_dim,
            dtype=self.spec.dtype,
            new_search=self.new_search,
        )

    def windows(self, layer: int) -> list[Window]:
        """Readers first, then the others, apart where they see different things."""
        reading, others = self._split(layer, self._column)
        groups: dict[tuple[int, int], list[int]] = {}
        for head in others:
            groups.setdefault(self.seen_by_others(Cell(layer, head)), []).append(head)
        rows = self.config.prefix_tokens
        return [self._window(heads, prefix=rows, position=rows) for heads in (reading, *groups.values()) if heads]

    def close(self, state: State, past: SessionPast) -> None:
        if self.readers and past.segments * self.config.segment_tokens < state.length:  # else it runs again
            self._append(state, past)
        for layer, windows in enumerate(state.layers):
            for window in windows:
                sinks, tail = self._sees(layer, window)
                rows = sink_and_tail_rows(window, state, sinks, tail)
                write_prefix(window, self.rope, window.k_HND[:, rows], window.v_HND[:, rows])
        state.filled = 0
        self.refresh(state, past)

    def refresh(self, state: State, past: SessionPast) -> None:
        if not self.readers or state.closed == 0:
            return
        state.retrieved_CR = past.decide(lambda: self._choice(state, past))
        self._insert_retrieved(state, past)

    def prefetch(self, state: State, past: SessionPast) -> None:
        """Guess by the queries so far; worth a search only if some of the past isn't in memory."""
        if self.readers and state.closed and not past.in_memory:
            past.prefetch(self._choice(state, past))

    def boundary(self, state: State) -> dict[str, Tensor]:
        """Queries and choice, and the prefix of the cells that aren't in past KV."""
        kept = {f"queries.{i}": q for i, q in enumerate(state.queries)} | {"retrieved": state.retrieved_CR}
        for layer, windows in enumerate(state.layers):
            for i, window in enumerate(windows):
                if not self._reads(layer, window):
                    prefix = slice(window.start, window.base)
                    kept[f"prefix.{layer}.{i}"] = torch.stack([window.k_HND[:, prefix], window.v_HND[:, prefix]])
        return kept

    def resume(self, boundary: dict[str, Tensor], past: SessionPast) -> State:
        state, device = self.begin(), self.spec.device
        state.length = past.segments * self.config.segment_tokens
        state.queries = [boundary[f"queries.{i}"].to(device) for i in range(len(self.watched))]
        state.retrieved_CR = boundary["retrieved"]
        sinks, tail = sinks_and_tail(state.length, self.config.sink_tokens, self.config.reader_tail_tokens)
        ends = torch.cat([torch.arange(sinks), torch.arange(state.length - tail, state.length)])
        kv_RC2D = past.gather(ends).to(device)
        for layer, windows in enumerate(state.layers):
            for i, window in enumerate(windows):
                if self._reads(layer, window):
                    k_HTD, v_HTD = self._of_heads(kv_RC2D, layer, window)
                else:
                    k_HTD, v_HTD = boundary[f"prefix.{layer}.{i}"].to(device)
                write_prefix(window, self.rope, k_HTD, v_HTD)
        self._insert_retrieved(state, past)
        return state

    def _choice(self, state: State, past: SessionPast) -> Tensor:
        """What the queries so far choose, of the tokens that readers don't see anyway."""
        sinks, tail = sinks_and_tail(state.closed, self.config.sink_tokens, self.config.reader_tail_tokens)
        return self.choose(state, past, sinks, state.closed - tail)

    def _reads(self, layer: int, window: Window) -> bool:
        return Cell(layer, window.heads[0]) in self._column

    def _sees(self, layer: int, window: Window) -> tuple[int, int]:
        if self._reads(layer, window):
            return self.config.sink_tokens, self.config.reader_tail_tokens
        return self.seen_by_others(Cell(layer, window.heads[0]))

    @torch.no_grad()
    def _append(self, state: State, past: SessionPast) -> None:
        """Hand the full segment's keys and values of the readers, and what is searched, to past KV."""
        kv_SC2D = self.like.new_empty((state.filled, len(self.readers), 2, self.spec.head_dim))
        for layer, windows in enumerate(state.layers):
            for window in windows:
                if self._reads(layer, window):
                    columns = self._columns(layer, window)
                    rows = slice(window.base, window.base + state.filled)
                    kv_SC2D[:, columns, 0] = window.k_HND[:, rows].transpose(0, 1)
                    kv_SC2D[:, columns, 1] = window.v_HND[:, rows].transpose(0, 1)
        past.append(kv_SC2D, self.searched(state))

    def _insert_retrieved(self, state: State, past: SessionPast) -> None:
        """Put the retrieved tokens between sinks and tail of every reader, in place of what was there."""
        sinks, tail = sinks_and_tail(state.closed, self.config.sink_tokens, self.config.reader_tail_tokens)
        kv_RC2D = past.gather(state.retrieved_CR).to(self.spec.device)
        for layer, windows in enumerate(state.layers):
            for window in windows:
                if self._reads(layer, window):
                    k_HRD, v_HRD = self._of_heads(kv_RC2D, layer, window)
                    head = slice(window.start, window.start + sinks)
                    end = slice(window.base - tail, window.base)
                    k = torch.cat([window.k_HND[:, head], k_HRD, window.k_HND[:, end]], dim=1)
                    v = torch.cat([window.v_HND[:, head], v_HRD, window.v_HND[:, end]], dim=1)
                    write_prefix(window, self.rope, k, v)

    def _of_heads(self, kv_RC2D: Tensor, layer: int, window: Window) -> tuple[Tensor, Tensor]:
        """Keys and values of a window's heads, [H, R, D] each."""
        k_RHD, v_RHD = kv_RC2D[:, self._columns(layer, window)].unbind(dim=2)
        return k_RHD.transpose(0, 1), v_RHD.transpose(0, 1)

    def _columns(self, layer: int, window: Window) -> slice:
        """A reading window's columns of past KV: adjacent, for readers are in the order of layers and heads."""
        first = self._column[Cell(layer, window.heads[0])]
        return slice(first, first + len(window.heads))
