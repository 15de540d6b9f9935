"""Blocks in host memory, within a budget; the least recently read leave first."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from segcore.errors import BlockMissing
from segcore.pastkv.base import BlockKey


class HostTier:
    """A `Tier`. Holds whatever it is given; `evict_to` is the manager's to call, once a block is held elsewhere."""

    def __init__(self) -> None:
        self.used_bytes = 0
        self._blocks: OrderedDict[BlockKey, Tensor] = OrderedDict()

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._blocks

    def put(self, key: BlockKey, block_SC2D: Tensor) -> None:
        self.delete(key)
        self._blocks[key] = block_SC2D
        self.used_bytes += block_SC2D.nbytes

    def rows(self, key: BlockKey, rows_n: Tensor) -> Tensor:
        if key not in self._blocks:
            raise BlockMissing(f"block {tuple(key)} isn't in host memory")
        self._blocks.move_to_end(key)
        return self._blocks[key][rows_n]

    def delete(self, key: BlockKey) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:
            self.used_bytes -= block.nbytes

    def evict_to(self, budget_bytes: int) -> None:
        """Drop the least recently read blocks until at most `budget_bytes` remain."""
        while self._blocks and self.used_bytes > budget_bytes:
            self.delete(next(iter(self._blocks)))
