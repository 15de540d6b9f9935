"""What the policies that retrieve share: a prefix of sinks, retrieved tokens and a tail, from past KV.

Shapes: C choices or cells, R retrieved tokens, S tokens of a segment, H KV heads, D head dimension.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from segcore.config import Cell, RetrievalConfig
from segcore.model import ModelSpec, Rope
from segcore.pastkv.base import PastLayout
from segcore.pastkv.session import SessionPast
from segcore.policies.base import Policy, segment_ends, sinks_and_tail, write_prefixes
from segcore.retrieval import KeyIndex
from segcore.state import State, Window

C = TypeVar("C", bound=RetrievalConfig)
# Keys and values, [H, N, D] each, by layer and the window's number in it.
Ends = dict[tuple[int, int], tuple[Tensor, Tensor]]


@dataclass
class Left:
    """What a full segment leaves on the device: what past KV is given, and how the readers' prefixes are completed.

    insert: writes what `State.retrieved_CR` says, and what else is missing.
    """

    kv_SC2D: Tensor | None
    searched: dict[str, Tensor]
    insert: Callable[[State, SessionPast], None]


class RetrievingPolicy(Policy[C]):
    """Reader cells see [sinks, retrieved, tail]; a subclass chooses, and says what other cells see.

    readers: the cells that read, ascending; their keys and values go to past KV.
    by_ends: what a close keeps in windows are sinks, tail and what was retrieved, of every cell at the same places.
    """

    by_ends: ClassVar[bool] = False

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
        # On a GPU a segment that is passed whole never stands in its window.
        room = 0 if self.like.is_cuda else self.config.segment_tokens
        made = []
        for heads in (reading, *groups.values()):
            if heads:
                rows = sum(self._full_prefix(Cell(layer, heads[0])))
                made.append(self._window(heads, prefix=rows, position=self.config.prefix_tokens, segment=room))
        return made

    def close(self, state: State, past: SessionPast) -> None:
        # A segment that runs again is in past KV already.
        keeps = bool(self.readers) and past.segments * self.config.segment_tokens < state.length
        if keeps:
            past.await_transfer()
        left, state.left = state.left or self._leave(state, keeps), None
        if left.kv_SC2D is not None and keeps:
            past.append(left.kv_SC2D, left.searched)
        state.filled = 0
        if self.readers:
            self._choose_anew(state, past, left.insert)

    def _leave(self, state: State, keeps: bool) -> Left:
        """Write other cells' prefixes, and take what the rest of a close needs before windows are written."""
        ends = {(layer, i): segment_ends(w, state, *self._sees(layer, w)) for layer, i, w in _numbered(state)}
        others = [(w, *ends[layer, i]) for layer, i, w in _numbered(state) if not self._reads(layer, w)]
        kv_SC2D, searched = (self._kv(state), self.searched(state)) if keeps else (None, {})
        write_prefixes(others, self.rope)
        return Left(kv_SC2D, searched, partial(self._insert_between, ends))

    def refresh(self, state: State, past: SessionPast) -> None:
        if self.readers and state.closed:
            sinks, tail = sinks_and_tail(state.closed, self.config.sink_tokens, self.config.reader_tail_tokens)
            reading = ((layer, i, w) for layer, i, w in _numbered(state) if self._reads(layer, w))
            ends = {(layer, i): prefix_ends(w, sinks, tail) for layer, i, w in reading}
            self._choose_anew(state, past, partial(self._insert_between, ends))

    def prefetch(self, state: State, past: SessionPast) -> None:
        """Guess by the queries so far; worth a search only if some of the past isn't in memory."""
        if self.readers and state.closed and not past.in_memory:
            past.prefetch(self._choice(state, past))

    def boundary(self, state: State) -> dict[str, Tensor]:
        """Queries and choice, and the prefix of the cells that aren't in past KV."""
        kept = {f"queries.{i}": q for i, q in enumerate(state.queries)} | {"retrieved": state.retrieved_CR}
        for layer, i, window in _numbered(state):
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
        ends_N = torch.cat([torch.arange(sinks), torch.arange(state.length - tail, state.length)])
        past.prefetch(torch.cat([ends_N, state.retrieved_CR.flatten()]))
        kv_NC2D = past.gather(ends_N)
        ends, others = {}, []
        for layer, i, window in _numbered(state):
            if self._reads(layer, window):
                ends[layer, i] = self._of_heads(kv_NC2D, layer, window)
            else:
                others.append((window, *boundary[f"prefix.{layer}.{i}"].to(device)))
        write_prefixes(others, self.rope)
        if self.readers:
            self._insert_between(ends, state, past)
        return state

    def prefix_of(self, layer: int, window: Window) -> tuple[int, int, int]:
        """Sinks, retrieved tokens and tail of a prefix that has them all."""
        return self._full_prefix(Cell(layer, window.heads[0]))

    def column(self, cell: Cell) -> int:
        """A cell's number among past KV's; -1 if it doesn't read."""
        return self._column.get(cell, -1)

    def insert(self, state: State, past: SessionPast) -> None:
        """Write the retrieved tokens into readers' prefixes that have them all; the ends are there already."""
        kv_RC2D = past.gather(state.retrieved_CR)
        for layer, _, window in _numbered(state):
            if self._reads(layer, window):
                row = window.start + self.prefix_of(layer, window)[0]
                k, v = self._of_heads(kv_RC2D, layer, window)
                window.write(row, k, self.rope.keys(k, window.position - window.base + row), v)

    def _choose_anew(self, state: State, past: SessionPast, insert: Callable[[State, SessionPast], None]) -> None:
        state.retrieved_CR = past.decide(lambda: self._choice(state, past))
        insert(state, past)

    def _choice(self, state: State, past: SessionPast) -> Tensor:
        """What the queries so far choose."""
        candidates = self.candidates(state.closed)
        return self.choose(state, past, candidates.start, candidates.stop)

    def candidates(self, closed: int) -> range:
        """What may be chosen after `closed` tokens: those that readers don't see anyway."""
        sinks, tail = sinks_and_tail(closed, self.config.sink_tokens, self.config.reader_tail_tokens)
        return range(sinks, closed - tail)

    def _reads(self, layer: int, window: Window) -> bool:
        return Cell(layer, window.heads[0]) in self._column

    def _sees(self, layer: int, window: Window) -> tuple[int, int]:
        sinks, _, tail = self.prefix_of(layer, window)
        return sinks, tail

    def _full_prefix(self, cell: Cell) -> tuple[int, int, int]:
        if cell in self._column:
            return self.config.sink_tokens, self.config.retrieved_tokens, self.config.reader_tail_tokens
        sinks, tail = self.seen_by_others(cell)
        return sinks, 0, tail

    @torch.no_grad()
    def _kv(self, state: State) -> Tensor:
        """The full segment's keys and values of the readers, [S, C, 2, D]."""
        kv_SC2D = self.like.new_empty((state.filled, len(self.readers), 2, self.spec.head_dim))
        for layer, _, window in _numbered(state):
            if self._reads(layer, window):
                columns, rows = self._columns(layer, window), slice(window.base, window.base + state.filled)
                kv_SC2D[:, columns, 0] = window.k_HND[:, rows].transpose(0, 1)
                kv_SC2D[:, columns, 1] = window.v_HND[:, rows].transpose(0, 1)
        return kv_SC2D

    def _insert_between(self, ends: Ends, state: State, past: SessionPast) -> None:
        """Write the prefix of every reader: its ends, sinks and tail, with the retrieved tokens in between."""
        kv_RC2D = past.gather(state.retrieved_CR)
        sinks, _ = sinks_and_tail(state.closed, self.config.sink_tokens, self.config.reader_tail_tokens)
        prefixes = []
        for layer, i, window in _numbered(state):
            if self._reads(layer, window):
                pairs = zip(ends[layer, i], self._of_heads(kv_RC2D, layer, window), strict=True)
                k, v = (torch.cat([x[:, :sinks], retrieved, x[:, sinks:]], dim=1) for x, retrieved in pairs)
                prefixes.append((window, k, v))
        write_prefixes(prefixes, self.rope, filled=state.filled)

    def _of_heads(self, kv_RC2D: Tensor, layer: int, window: Window) -> tuple[Tensor, Tensor]:
        """Keys and values of a window's heads, [H, R, D] each."""
        k_RHD, v_RHD = kv_RC2D[:, self._columns(layer, window)].unbind(dim=2)
        return k_RHD.transpose(0, 1), v_RHD.transpose(0, 1)

    def _columns(self, layer: int, window: Window) -> slice:
        """A reading window's columns of past KV: adjacent, for readers are in the order of layers and heads."""
        first = self._column[Cell(layer, window.heads[0])]
        return slice(first, first + len(window.heads))


def prefix_ends(window: Window, sinks: int, tail: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the first and last tokens of a prefix."""
    return window.between((window.start, window.start + sinks), (window.base - tail, window.base))


def _numbered(state: State) -> Iterator[tuple[int, int, Window]]:
    """Every window, with its layer and its number in it."""
    for layer, windows in enumerate(state.layers):
        for i, window in enumerate(windows):
            yield layer, i, window
