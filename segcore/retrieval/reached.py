"""Exact keys in host memory that a GPU gathers by itself: judging candidates waits for no one.

Shapes: C selectors, N tokens of a segment, D head dimension, B blocks, n tokens gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from segcore.pinned import pinned_memory
from segcore.retrieval.exhaustive import ExhaustiveIndex

try:
    import triton
    from triton import language as tl
except ImportError:  # it comes with torch where there is a GPU
    triton = None


def can_reach(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU's own kernels gather from host memory there."""
    return triton is not None and device.type == "cuda" and dtype.itemsize == 2


class ReachedIndex(ExhaustiveIndex):
    """As its parent, with every segment's keys in pinned host memory, whatever the budget on the device."""

    _rows: list[Tensor]  # [C, N, D] each
    _addresses: Tensor  # of the rows, on the device, with room for more

    @property
    def device_bytes(self) -> int:
        return self._addresses.nbytes if self._segment else 0

    @property
    def host_bytes(self) -> int:
        return sum(row.nbytes for row in self._rows) if self._segment else 0

    @property
    def allocated(self) -> list[Tensor]:
        return [*self._rows, self._addresses] if self._segment else []

    def keys(self, numbers_per_key: int) -> Iterator[Tensor]:
        for row_CND in self._rows:
            yield row_CND.to(self._spec.device, non_blocking=True)

    def _start(self) -> None:
        self._rows, self._addresses = [], torch.zeros(64, dtype=torch.int64, device=self._spec.device)

    def _append(self, keys_CND: Tensor) -> None:
        row_CND = pinned_memory().take(tuple(keys_CND.shape), keys_CND.dtype)
        # By way of the device, which may still read what was in this memory before.
        row_CND.copy_(keys_CND.to(self._spec.device, non_blocking=True), non_blocking=True)
        if len(self._rows) == len(self._addresses):
            self._addresses = torch.cat([self._addresses, torch.zeros_like(self._addresses)])
        self._addresses[len(self._rows)].fill_(row_CND.data_ptr())
        self._rows.append(row_CND)

    def _truncate(self, segments: int) -> None:
        del self._rows[segments:]

    def _unshare(self) -> None:
        if self._segment:
            self._rows, self._addresses = list(self._rows), self._addresses.clone()

    def _gather(self, positions_n: Tensor) -> Tensor:
        selectors, dim = self._spec.selectors, self._spec.head_dim
        keys_CnD = torch.empty((selectors, len(positions_n), dim), dtype=self._spec.dtype, device=self._spec.device)
        grid = (-(-len(positions_n) // _BLOCK_N), selectors)
        side = 1 << (dim - 1).bit_length()
        _gather[grid](positions_n, self._addresses, keys_CnD, len(positions_n), self._segment, dim, side, _BLOCK_N)
        return keys_CnD


_BLOCK_N = 16


def _gather_tile(  # type: ignore[no-untyped-def]
    positions, addresses, out, count, segment, dim, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Some tokens' keys of one selector."""
    n, d, c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.program_id(1)
    inside = (n[:, None] < count) & (d[None, :] < dim)
    at = tl.load(positions + n, mask=n < count, other=0)
    # As numbers from `out`, which has their type.
    far = (tl.load(addresses + at // segment) - out.to(tl.int64)) // 2
    row = far + (c * segment + at % segment) * dim
    keys = tl.load(out + row[:, None] + d[None, :], mask=inside, other=0.0)
    tl.store(out + (c * count + n[:, None]) * dim + d[None, :], keys, mask=inside)


_gather: Any = triton.jit(_gather_tile) if triton is not None else None
