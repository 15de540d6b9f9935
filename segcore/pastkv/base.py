"""What a block of past KV is, and what every tier promises.

A tier makes a block readable only after its write completed; a missing or damaged block is a typed error, never
silent garbage (design, section 7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class BlockKey(NamedTuple):
    """A block is one closed segment of one stream, unique within a process."""

    stream: int
    segment: int


@dataclass(frozen=True, kw_only=True)
class PastLayout:
    """Shape of a stream's past KV.

    A block is [segment_tokens, cells, 2, head_dim]: token-major, so that a token's keys (unrotated) and values of all
    reader cells are one contiguous row, since one selection serves all cells. Selector keys are the index beside it.
    """

    segment_tokens: int
    cells: int
    selectors: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes_per_token(self) -> int:
        return self.cells * 2 * self.head_dim * self.dtype.itemsize

    @property
    def index_bytes_per_token(self) -> int:
        return self.selectors * self.head_dim * self.dtype.itemsize


class Tier(Protocol):
    """A place for blocks. All methods may be called from one thread at a time."""

    used_bytes: int

    def put(self, key: BlockKey, block_SC2D: Tensor) -> None:
        """Store a host tensor, which must not change afterwards. Raises StorageFull, PastKVError."""
        ...

    def rows(self, key: BlockKey, rows_n: Tensor) -> Tensor:
        """Some rows of a block, [n, C, 2, D], in the order asked for. Raises BlockMissing, BlockDamaged."""
        ...

    def delete(self, key: BlockKey) -> None:
        """Forget a block; no error if it is absent."""
        ...
