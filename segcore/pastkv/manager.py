"""Past KV of all streams of an engine: write-through to disk, a budget in host memory, rows gathered by position."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from segcore.config import CacheConfig
from segcore.errors import StorageFull
from segcore.pastkv.base import BlockKey, PastLayout
from segcore.pastkv.disk import DiskTier
from segcore.pastkv.host import HostTier


class PastKVManager:
    """The tiers, shared by the streams of an engine. Every block is on disk, if there is one, before it is readable."""

    def __init__(self, config: CacheConfig) -> None:
        self._budget_bytes = config.host_bytes
        self._host = HostTier()
        self._disk = None if config.directory is None else DiskTier(config.directory, config.disk_bytes)
        self._index_bytes = 0
        self._streams = itertools.count()

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory: blocks and selector keys."""
        return self._host.used_bytes + self._index_bytes

    @property
    def disk_bytes(self) -> int:
        return 0 if self._disk is None else self._disk.used_bytes

    def open_stream(self, layout: PastLayout | None) -> SessionPast:
        """An empty past for a new stream."""
        return SessionPast(self, next(self._streams), layout)

    def put(self, key: BlockKey, block_SC2D: Tensor, index_bytes: int) -> None:
        """Store a block, and make room for its selector keys. Raises StorageFull, PastKVError; then nothing is kept."""
        if self._disk is not None:
            self._make_room(index_bytes)
            self._disk.put(key, block_SC2D)
        else:
            self._make_room(index_bytes + block_SC2D.nbytes)
        self._index_bytes += index_bytes
        self._host.put(key, block_SC2D)
        if self._disk is not None:
            self._host.evict_to(self._budget_bytes - self._index_bytes)

    def rows(self, key: BlockKey, rows_n: Tensor) -> Tensor:
        """Rows of a block from the nearest tier that holds it; see `Tier.rows`."""
        if self._disk is None or key in self._host:
            return self._host.rows(key, rows_n)
        return self._disk.rows(key, rows_n)

    def delete(self, keys: Sequence[BlockKey], index_bytes: int) -> None:
        """Forget blocks in every tier, and their selector keys' bytes."""
        self._index_bytes -= index_bytes
        for key in keys:
            self._host.delete(key)
            if self._disk is not None:
                self._disk.delete(key)

    def close(self) -> None:
        """Release everything, on disk too."""
        self._host.evict_to(0)
        if self._disk is not None:
            self._disk.close()

    def _make_room(self, needed_bytes: int) -> None:
        unevictable = self._index_bytes if self._disk is not None else self.host_bytes
        if unevictable + needed_bytes > self._budget_bytes:
            raise StorageFull(
                f"past KV needs {needed_bytes} more bytes of host memory, and {unevictable} of {self._budget_bytes}"
                " are in use; delete sessions, raise host_bytes, or set a directory for the disk tier"
            )


class SessionPast:
    """The past of one stream: its blocks in order, and its selectors' keys."""

    def __init__(self, manager: PastKVManager, stream: int, layout: PastLayout | None) -> None:
        self._manager, self._stream, self._layout = manager, stream, layout
        self._keys: list[Tensor] = []

    @property
    def segments(self) -> int:
        return len(self._keys)

    def append(self, block_SC2D: Tensor, selector_keys_CSD: Tensor) -> None:
        """Store the segment that just closed. Raises StorageFull, PastKVError."""
        assert self._layout is not None
        expected = (self._layout.segment_tokens, self._layout.cells, 2, self._layout.head_dim)
        assert block_SC2D.shape == expected, (block_SC2D.shape, expected)
        keys = selector_keys_CSD.detach().cpu().contiguous()
        self._manager.put(BlockKey(self._stream, self.segments), block_SC2D.detach().cpu(), keys.nbytes)
        self._keys.append(keys)

    def gather(self, positions_R: Tensor) -> Tensor:
        """Keys and values of past tokens, [R, C, 2, D] in host memory, in the order of ascending `positions_R`."""
        assert self._layout is not None
        positions = positions_R.cpu()
        segments = positions // self._layout.segment_tokens
        parts = []
        for segment in torch.unique(segments).tolist():
            rows_n = positions[segments == segment] % self._layout.segment_tokens
            parts.append(self._manager.rows(BlockKey(self._stream, segment), rows_n))
        if not parts:
            return torch.empty((0, self._layout.cells, 2, self._layout.head_dim), dtype=self._layout.dtype)
        return torch.cat(parts)

    def selector_keys(self) -> Iterator[Tensor]:
        """The selectors' unrotated keys, [selectors, segment_tokens, D] a piece, in stream order."""
        return iter(self._keys)

    def drop(self) -> None:
        """Forget this past in every tier."""
        keys = [BlockKey(self._stream, segment) for segment in range(self.segments)]
        self._manager.delete(keys, sum(k.nbytes for k in self._keys))
        self._keys = []
