"""Blocks in memory: the host's, or a device's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor

from segcore.errors import BlockMissing
from segcore.pastkv.base import Block, BlockHead


class MemoryTier:
    """A `Tier` within `budget_bytes`. Takes incomplete blocks too: the manager completes them later.

    device: where a block's bulk is kept; host memory is pinned where the machine has CUDA, so that copies to the
    device don't wait.
    """

    def __init__(self, name: str, budget_bytes: int, device: torch.device) -> None:
        self.name, self.budget_bytes, self._device = name, budget_bytes, device
        self._pin = device.type == "cpu" and torch.cuda.is_available()
        self._blocks: OrderedDict[str, Block] = OrderedDict()
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def keys(self) -> tuple[str, ...]:
        """Least recently used first."""
        return tuple(self._blocks)

    def put(self, block: Block) -> None:
        self.delete(block.key)
        kv_SC2D = block.kv_SC2D.to(self._device)
        if self._pin:
            kv_SC2D = kv_SC2D.pin_memory()
        self._blocks[block.key] = Block(block.key, kv_SC2D, block.index, block.boundary)
        self._used_bytes += block.nbytes

    def get(self, key: str) -> Block:
        """The block itself, complete or not. Raises BlockMissing."""
        if key not in self._blocks:
            raise BlockMissing(f"block {key} isn't in {self.name} memory")
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def rows(self, key: str, rows_n: Tensor) -> Tensor:
        kv_SC2D = self.get(key).kv_SC2D
        return kv_SC2D[rows_n.to(kv_SC2D.device)]

    def head(self, key: str) -> BlockHead:
        block = self.get(key)
        if not block.boundary:
            raise BlockMissing(f"block {key} isn't complete")
        return BlockHead(block.index, block.boundary)

    def holds(self, key: str) -> bool:
        return key in self._blocks

    def delete(self, key: str) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:
            self._used_bytes -= block.nbytes

    def evict(self, spare: Iterable[str], needed_bytes: int) -> None:
        for key in spare:
            if self._used_bytes + needed_bytes <= self.budget_bytes:
                return
            self.delete(key)

    def close(self) -> None:
        self._blocks.clear()
        self._used_bytes = 0
