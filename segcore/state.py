"""What F carries from chunk to chunk (design, section 2). Its size on the device doesn't depend on the stream's length.

Shapes: H KV heads, N rows, D head dimension, G query heads per KV head, L_q tokens of the query window.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Window:
    """Keys and values that the queries of some KV heads of one layer see. A row's index is its RoPE position.

    Rows [start, base) are the prefix, in stream order, right-aligned; rows [base, base + filled) are the open segment.
    Rows outside are never attended to.

    heads: the KV heads, ascending. k_HND: keys before rotation. rotated_HND: the same keys, rotated to their rows.
    """

    heads: tuple[int, ...]
    k_HND: Tensor
    rotated_HND: Tensor
    v_HND: Tensor
    start: int
    base: int

    @classmethod
    def allocate(cls, heads: tuple[int, ...], rows: int, base: int, like: Tensor, head_dim: int) -> Window:
        k, rotated, v = (like.new_zeros((len(heads), rows, head_dim)) for _ in range(3))
        return cls(heads, k, rotated, v, start=base, base=base)

    def write(self, row: int, k_HTD: Tensor, rotated_HTD: Tensor, v_HTD: Tensor) -> None:
        """Put keys and values at rows row, row + 1, ..."""
        rows = slice(row, row + k_HTD.shape[1])
        assert rows.stop <= self.k_HND.shape[1]
        self.k_HND[:, rows], self.rotated_HND[:, rows], self.v_HND[:, rows] = k_HTD, rotated_HTD, v_HTD

    def grow(self, rows: int) -> None:
        """Make room for `rows` rows, doubling, so that growing costs a constant per row."""
        held = self.k_HND.shape[1]
        if rows <= held:
            return
        pad = (0, 0, 0, max(rows, 2 * held) - held)
        self.k_HND = torch.nn.functional.pad(self.k_HND, pad)
        self.rotated_HND = torch.nn.functional.pad(self.rotated_HND, pad)
        self.v_HND = torch.nn.functional.pad(self.v_HND, pad)

    @property
    def nbytes(self) -> int:
        return self.k_HND.nbytes + self.rotated_HND.nbytes + self.v_HND.nbytes


@dataclass
class State:
    """A stream's state.

    layers: the windows of each layer; together they hold each KV head once.
    queries: unrotated queries of the query window by selector, [G, <=L_q, D] each, oldest first.
    retrieved_R: stream positions of the retrieved prefix, ascending.
    length: tokens of the stream so far. filled: tokens of the open segment.
    """

    layers: list[list[Window]]
    queries: list[Tensor] = field(default_factory=list)
    retrieved_R: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    length: int = 0
    filled: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(w.nbytes for windows in self.layers for w in windows) + sum(q.nbytes for q in self.queries)
