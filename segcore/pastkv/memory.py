"""Blocks in memory: the host's, or a device's; and rows of blocks that stay in slower tiers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from segcore.errors import BlockMissing, StorageFull
from segcore.pastkv.base import Block, BlockHead


class MemoryTier:
    """A `Tier` within `budget_bytes`. Takes incomplete blocks too: the manager completes them later.

    device: where a block's bulk is kept; the host's takes it from wherever it is, for it may be on its way here.
    """

    def __init__(self, name: str, budget_bytes: int, device: torch.device) -> None:
        self.name, self.budget_bytes, self._device = name, budget_bytes, device
        self._blocks: OrderedDict[str, Block] = OrderedDict()
        self._used_bytes = 0
        self._lock = threading.RLock()

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def keys(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._blocks)

    def put(self, block: Block, spare: Iterable[str] = ()) -> None:
        """Store a block, or put it in place of an incomplete one. Raises StorageFull."""
        kv_SC2D = self._copy(block.kv_SC2D)
        with self._lock:
            self.delete(block.key)
            for key in spare if block.nbytes <= self.budget_bytes else ():
                if self._used_bytes + block.nbytes <= self.budget_bytes:
                    break
                self.delete(key)
            if self._used_bytes + block.nbytes > self.budget_bytes:
                raise StorageFull(f"{self.name} memory is full ({self._used_bytes} of {self.budget_bytes} bytes)")
            self._blocks[block.key] = replace(block, kv_SC2D=kv_SC2D)
            self._used_bytes += block.nbytes

    def get(self, key: str) -> Block:
        """The block itself, complete or not. Raises BlockMissing."""
        with self._lock:
            if key not in self._blocks:
                raise BlockMissing(f"block {key} isn't in {self.name} memory")
            self._blocks.move_to_end(key)
            return self._blocks[key]

    def find(self, key: str) -> Block | None:
        """The block itself, complete or not, if it is here; its last use isn't now."""
        with self._lock:
            return self._blocks.get(key)

    def rows(self, key: str, rows_n: Tensor) -> Tensor:
        kv_SC2D = self.get(key).kv_SC2D
        # From pinned memory the device takes them without waiting; for what comes and goes torch keeps some.
        pin = kv_SC2D.is_cpu and torch.cuda.is_available()
        out = torch.empty((len(rows_n), *kv_SC2D.shape[1:]), dtype=kv_SC2D.dtype, device=kv_SC2D.device, pin_memory=pin)
        return torch.index_select(kv_SC2D, 0, rows_n.to(kv_SC2D.device), out=out)

    def head(self, key: str, *, boundary: bool = True) -> BlockHead:
        block = self.get(key)
        if not block.boundary:
            raise BlockMissing(f"block {key} isn't complete")
        return BlockHead(block.index, block.boundary)

    def holds(self, key: str) -> bool:
        with self._lock:
            return key in self._blocks

    def delete(self, key: str) -> None:
        with self._lock:
            block = self._blocks.pop(key, None)
            if block is not None:
                self._used_bytes -= block.nbytes

    def close(self) -> None:
        with self._lock:
            self._blocks.clear()
            self._used_bytes = 0

    def _copy(self, kv_SC2D: Tensor) -> Tensor:
        """Where this tier keeps it. Raises StorageFull: a driver refuses memory that a budget allowed."""
        try:
            return kv_SC2D if self._device.type == "cpu" else kv_SC2D.to(self._device)
        except RuntimeError as error:
            raise StorageFull(f"{self.name} memory can't be had: {error}") from error


@dataclass(frozen=True)
class Rows:
    """Some rows of a block: their numbers, ascending, [n], and their keys and values."""

    rows_n: Tensor
    kv_nC2D: Tensor

    @property
    def nbytes(self) -> int:
        return self.kv_nC2D.nbytes

    def lacking(self, rows_m: Tensor) -> Tensor:
        """Those of `rows_m` that aren't here."""
        return rows_m[~torch.isin(rows_m, self.rows_n)]

    def take(self, rows_m: Tensor) -> Tensor:
        """Keys and values of rows that are here, [m, C, 2, D], in the order asked for."""
        return self.kv_nC2D[torch.searchsorted(self.rows_n, rows_m)]

    def joined(self, other: Rows) -> Rows:
        """These and `other`, which has none of them."""
        rows_n, order = torch.cat([self.rows_n, other.rows_n]).sort()
        return Rows(rows_n, torch.cat([self.kv_nC2D, other.kv_nC2D])[order])


class RowCache:
    """Rows that were prefetched, or read a moment ago, from slower tiers, within `budget_bytes`.

    They may be forgotten at any time: slower tiers hold their blocks.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._rows: OrderedDict[str, Rows] = OrderedDict()
        self._used_bytes = 0
        self._lock = threading.RLock()

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def keys(self) -> tuple[str, ...]:
        """Least recently used first."""
        with self._lock:
            return tuple(self._rows)

    def get(self, key: str) -> Rows | None:
        """What is here of a block."""
        with self._lock:
            if key in self._rows:
                self._rows.move_to_end(key)
            return self._rows.get(key)

    def bytes_of(self, key: str) -> int:
        """How much is here of a block."""
        with self._lock:
            return self._rows[key].nbytes if key in self._rows else 0

    def put(self, key: str, rows: Rows) -> None:
        """Keep these instead of what was here of the block, and forget others if need be; rows that don't fit aren't
        kept."""
        with self._lock:
            self.delete(key)
            if rows.nbytes > self.budget_bytes:
                return
            while self._used_bytes + rows.nbytes > self.budget_bytes:
                self.delete_oldest()
            self._rows[key] = rows
            self._used_bytes += rows.nbytes

    def delete(self, key: str) -> None:
        with self._lock:
            rows = self._rows.pop(key, None)
            if rows is not None:
                self._used_bytes -= rows.nbytes

    def delete_oldest(self) -> bool:
        """Forget what was used least recently; whether there was any."""
        with self._lock:
            oldest = next(iter(self._rows), None)
            if oldest is not None:
                self.delete(oldest)
            return oldest is not None
