"""What a block of past KV is, and what every tier promises.

A tier makes a block readable only after its write completed; a missing or damaged block is a typed error, never
silent garbage (design, section 7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from segcore.retrieval.base import KeyIndex


@dataclass(frozen=True, kw_only=True)
class PastLayout:
    """Shape of a stream's past KV.

    A block's bulk is [segment_tokens, cells, 2, head_dim]: token-major, so that a token's keys (unrotated) and values
    of all reader cells are one contiguous row, since one selection serves all cells.
    new_search: makes what a stream's selector keys are searched with; None: choices go through the blocks' own index.
    """

    segment_tokens: int
    cells: int
    selectors: int
    head_dim: int
    dtype: torch.dtype
    new_search: Callable[[], KeyIndex] | None = None

    @property
    def block_bytes_per_token(self) -> int:
        return self.cells * 2 * self.head_dim * self.dtype.itemsize

    @property
    def index_bytes_per_token(self) -> int:
        return self.selectors * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """One closed segment, immutable. Tensors are in host memory unless a tier says otherwise.

    key: a hash of everything the block depends on: fingerprint, tenant, and all tokens up to its end.
    kv_SC2D: keys and values. index: what later choices search. boundary: what else it takes to go on after this
    segment; empty until the block is complete. tenant: whose it is.
    """

    key: str
    kv_SC2D: Tensor
    index: dict[str, Tensor]
    boundary: dict[str, Tensor]
    tenant: str = ""

    @property
    def nbytes(self) -> int:
        return self.kv_SC2D.nbytes + nbytes(self.index) + nbytes(self.boundary)


@dataclass(frozen=True)
class BlockHead:
    """A block without its bulk."""

    index: dict[str, Tensor]
    boundary: dict[str, Tensor]


def nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


class Tier(Protocol):
    """A place for blocks. Methods may be called from several threads.

    Reads raise BlockMissing, BlockDamaged, and BlockMismatch for a block of another model, layout, adapter or tenant;
    writes raise StorageFull; both raise TierUnavailable.
    """

    name: str

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks here, as far as known without asking: never slow."""
        ...

    @property
    def keys(self) -> tuple[str, ...]:
        """The blocks that this process put here and that are still here as far as known, least recently used first."""
        ...

    def put(self, block: Block, spare: Iterable[str] = ()) -> None:
        """Store a complete block; readable once this returns, absent if it raises. No effect if it is there.

        spare: blocks to forget if room is needed, the first ones first; read only so far as they are needed.
        """
        ...

    def rows(self, key: str, rows_n: Tensor) -> Tensor:
        """Some rows of a block's bulk, [n, C, 2, D], in the order asked for."""
        ...

    def head(self, key: str, *, boundary: bool = True) -> BlockHead:
        """Index of a block and, where it is asked for, its boundary."""
        ...

    def holds(self, key: str) -> bool:
        """Whether the block is there, whole as far as can be told without reading it."""
        ...

    def delete(self, key: str) -> None:
        """Forget a block; no error if it is absent."""
        ...

    def close(self) -> None:
        """Release what this process holds."""
        ...
