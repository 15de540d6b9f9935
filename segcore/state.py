"""What F carries from chunk to chunk (design, section 2). Its size on the device doesn't depend on the stream's length.

Shapes: H KV heads, N rows, D head dimension, G query heads per KV head, L_q tokens of the query window, C choices.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_versions = itertools.count()
# Rows that a window has first that had no room for the segment.
_LEAST_ROOM = 64


@dataclass
class Window:
    """Keys and values that the queries of some KV heads of one layer see.

    Rows [start, base) are the prefix, in stream order, right-aligned; rows [base, base + filled) are the open segment,
    whose first token takes RoPE position `position`. Rows outside are never attended to. The segment may have less room
    than it needs (`reserve`).

    heads: the KV heads, ascending. k_HND: keys before rotation. rotated_HND: the same keys, rotated.
    """

    heads: tuple[int, ...]
    k_HND: Tensor
    rotated_HND: Tensor
    v_HND: Tensor
    start: int
    base: int
    position: int

    @classmethod
    def allocate(
        cls, heads: tuple[int, ...], like: Tensor, head_dim: int, *, segment: int, prefix: int = 0, position: int = 0
    ) -> Window:
        """An empty window with room for `prefix` rows and a segment."""
        k, rotated, v = (like.new_zeros((len(heads), prefix + segment, head_dim)) for _ in range(3))
        return cls(heads, k, rotated, v, start=prefix, base=prefix, position=position)

    def write(self, row: int, k_HTD: Tensor, rotated_HTD: Tensor, v_HTD: Tensor) -> None:
        """Put keys and values at rows row, row + 1, ...: in place, or into copies if there may be a backward pass.

        It needs the rows that attention saw, and so does whatever recomputes them.
        """
        if torch.is_grad_enabled():
            self.k_HND, self.rotated_HND, self.v_HND = self.k_HND.clone(), self.rotated_HND.clone(), self.v_HND.clone()
        for rows, values in zip(self.rows(row, k_HTD.shape[1]), (k_HTD, rotated_HTD, v_HTD), strict=True):
            rows.copy_(values)

    def become(self, k_HND: Tensor, rotated_HND: Tensor, v_HND: Tensor, filled: int = 0) -> None:
        """Take a prefix before the open segment's `filled` rows: in place; into tensors of its own, with no room for
        more, where it doesn't fit or there may be a backward pass."""
        if torch.is_grad_enabled() or k_HND.shape[1] > self.base:
            pairs = zip((k_HND, rotated_HND, v_HND), self.rows(self.base, filled), strict=True)
            self.k_HND, self.rotated_HND, self.v_HND = (torch.cat(pair, dim=1) if filled else pair[0] for pair in pairs)
            self.start, self.base = 0, k_HND.shape[1]
        else:
            self.start = self.base - k_HND.shape[1]
            self.write(self.start, k_HND, rotated_HND, v_HND)

    def reserve(self, rows: int, segment: int) -> bool:
        """Room for rows [0, rows); it doubles, up to a segment's. Whether the window moved."""
        held = self.k_HND.shape[1]
        if rows > held:
            room = max(rows - self.base, 2 * (held - self.base), _LEAST_ROOM)
            self._grow(self.base + min(room, max(segment, rows - self.base)), at_end=True)
        return rows > held

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views of keys, rotated keys and values at rows first, first + 1, ..."""
        assert 0 <= first <= first + count <= self.k_HND.shape[1]
        rows = slice(first, first + count)
        return self.k_HND[:, rows], self.rotated_HND[:, rows], self.v_HND[:, rows]

    def offsets(self, anchor: Tensor) -> Tensor:
        """Where row 0 of its heads' keys, rotated keys and values lies: [H, 3], in numbers from `anchor`."""
        tensors, size = (self.k_HND, self.rotated_HND, self.v_HND), anchor.element_size()
        assert all(x[0].is_contiguous() for x in tensors)
        first = torch.tensor([(x.data_ptr() - anchor.data_ptr()) // size for x in tensors])
        return first + torch.arange(len(self.heads))[:, None] * torch.tensor([x.stride(0) for x in tensors])

    def between(self, *rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Copies of the keys, unrotated, and values of some ranges of rows, one behind the other, [H, n, D] each."""
        k, v = ([x[:, first:stop] for first, stop in rows] for x in (self.k_HND, self.v_HND))
        return torch.cat(k, dim=1), torch.cat(v, dim=1)

    def keep(self, rows: Tensor, position: int) -> None:
        """Make `rows`, [n] or one choice per head [H, n], the prefix of an empty segment, as they are rotated.

        A prefix that outgrows the window makes it grow, by doubling, so that growing costs a constant per row.
        """
        heads = torch.arange(len(self.heads), device=rows.device)[:, None]
        index = (heads, rows.expand(len(self.heads), -1))
        k, rotated, v = self.k_HND[index], self.rotated_HND[index], self.v_HND[index]
        segment = self.k_HND.shape[1] - self.base
        if k.shape[1] > self.base and not torch.is_grad_enabled():
            self._grow(max(k.shape[1], 2 * self.base) + segment)
        self.position = position
        self.become(k, rotated, v)

    def extend(self, filled: int) -> None:
        """Make the full segment part of the prefix, in place, and begin an empty one of the same room after it."""
        self.base += filled
        self.position += filled
        if self.base + filled > self.k_HND.shape[1]:
            self._grow(2 * self.base + filled, at_end=True)

    def _grow(self, rows: int, *, at_end: bool = False) -> None:
        more = rows - self.k_HND.shape[1]
        pad = (0, 0, 0, more) if at_end else (0, 0, more, 0)
        self.k_HND = torch.nn.functional.pad(self.k_HND, pad)
        self.rotated_HND = torch.nn.functional.pad(self.rotated_HND, pad)
        self.v_HND = torch.nn.functional.pad(self.v_HND, pad)
        if not at_end:
            self.start, self.base = self.start + more, self.base + more

    @property
    def nbytes(self) -> int:
        return self.k_HND.nbytes + self.rotated_HND.nbytes + self.v_HND.nbytes


@dataclass
class State:
    """A stream's state.

    layers: the windows of each layer; together they hold each KV head once.
    queries: unrotated queries of the query window by watched cell, [G, <=L_q, D] each, oldest first.
    retrieved_CR: stream positions of the retrieved prefix, ascending; one row per choice: one for all readers, or one
    for each. length: tokens of the stream so far. filled: tokens of the open segment. events: passes and marks so far
    (`pastkv.journal`). left: what a pass over the whole segment has done of its close already.
    version: another number whenever windows have moved or their prefix has changed. room: tokens of the open segment
    that every window is known to have room for, so that not all are asked at every token.
    """

    layers: list[list[Window]]
    queries: list[Tensor] = field(default_factory=list)
    retrieved_CR: Tensor = field(default_factory=lambda: torch.empty((1, 0), dtype=torch.long))
    length: int = 0
    filled: int = 0
    events: int = 0
    left: Any = field(default=None, compare=False)
    version: int = field(default_factory=_versions.__next__, compare=False)
    room: int = field(default=0, compare=False)

    def reserve(self, tokens: int, segment: int) -> None:
        """Room for so many tokens more of the open segment in every window."""
        if self.filled + tokens <= self.room:
            return
        windows = [w for windows in self.layers for w in windows]
        moved = [w.reserve(w.base + self.filled + tokens, segment) for w in windows]
        if any(moved):
            self.moved()
        self.room = min(w.k_HND.shape[1] - w.base for w in windows)

    def rewind(self, tokens: int) -> None:
        """Forget the open segment's latest tokens, which are run again: their rows in windows are written anew."""
        self.length -= tokens
        self.filled -= tokens
        self.queries = [q[:, :-tokens] for q in self.queries]

    def moved(self) -> None:
        """Windows have moved, or their prefix has changed."""
        self.version, self.room = next(_versions), 0

    @property
    def closed(self) -> int:
        """Tokens of the closed segments."""
        return self.length - self.filled

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(w.nbytes for windows in self.layers for w in windows) + sum(q.nbytes for q in self.queries)
