"""The past of one stream: its journal, its blocks in order, and what later choices search.

Shapes: C cells, R retrieved tokens, S tokens of a segment, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from segcore.errors import PastKVError
from segcore.pastkv.base import Block, PastLayout
from segcore.pastkv.journal import Journal

if TYPE_CHECKING:
    from segcore.pastkv.manager import PastKVManager


class SessionPast:
    """One stream's past. Its blocks are shared with every stream that began in the same way.

    root: the key before the first block. index: what later choices search, one piece per closed segment.
    """

    def __init__(self, manager: PastKVManager, layout: PastLayout | None, root: str) -> None:
        self._manager, self._layout, self.root = manager, layout, root
        self.journal = Journal()
        self.index: list[dict[str, Tensor]] = []
        self._keys: list[str] = []

    @property
    def segments(self) -> int:
        """Closed segments that are in past KV."""
        return len(self._keys)

    def append(self, kv_SC2D: Tensor, index: dict[str, Tensor]) -> None:
        """Take the segment that just closed; readable at once, durable after `complete`.

        Raises StorageFull; then nothing is kept.
        """
        assert self._layout is not None
        layout, first = self._layout, self.segments * self._layout.segment_tokens
        expected = (layout.segment_tokens, layout.cells, 2, layout.head_dim)
        assert kv_SC2D.shape == expected, (kv_SC2D.shape, expected)
        key = self.journal.key(self.last_key, first, first + layout.segment_tokens)
        index = {name: tensor.detach().cpu().contiguous() for name, tensor in index.items()}
        self._manager.prepare(Block(key, kv_SC2D.detach().cpu(), index, {}))
        self._keys.append(key)
        self.index.append(index)

    def complete(self, boundary: dict[str, Tensor]) -> None:
        """The last segment is closed: its block is whole, and goes to the lower tiers."""
        self._manager.complete(self.last_key, {name: t.detach().cpu().contiguous() for name, t in boundary.items()})

    def gather(self, positions: Tensor) -> Tensor:
        """Keys and values of past tokens, [R, C, 2, D] in host memory.

        positions: ascending, [R] or [1, R] for all cells alike, or [C, R], each cell its own. Raises PastKVError,
        with the number of the segment that couldn't be read in its details.
        """
        assert self._layout is not None
        size, positions_CR = self._layout.segment_tokens, torch.atleast_2d(positions.cpu())
        wanted = torch.unique(positions_CR)
        parts = [torch.empty((0, self._layout.cells, 2, self._layout.head_dim), dtype=self._layout.dtype)]
        for segment in torch.unique(wanted // size).tolist():
            parts.append(self._rows(segment, wanted[wanted // size == segment] % size))
        kv_nC2D = torch.cat(parts)
        if positions_CR.shape[0] == 1:
            return kv_nC2D
        rows_CR = torch.searchsorted(wanted, positions_CR.contiguous())
        return kv_nC2D[rows_CR.T, torch.arange(self._layout.cells)]

    def fork(self) -> SessionPast:
        """An independent past that shares this one's blocks."""
        fork = SessionPast(self._manager, self._layout, self.root)
        fork.journal, fork.index, fork._keys = self.journal.copy(), list(self.index), list(self._keys)
        for key, index in zip(self._keys, self.index, strict=True):
            self._manager.share(key, index)
        return fork

    def adopt(self, key: str) -> dict[str, Tensor]:
        """Continue with a block that another stream made of the same tokens; returns its boundary.

        Raises PastKVError; then nothing changes.
        """
        head = self._manager.head(key)
        self._manager.share(key, head.index)
        self._keys.append(key)
        self.index.append(head.index)
        return head.boundary

    def available(self, key: str) -> bool:
        """Whether a block can be had, as far as can be told without reading it."""
        return self._manager.holds(key)

    def boundary(self) -> dict[str, Tensor]:
        """The last block's boundary. Raises PastKVError."""
        return self._manager.head(self.last_key).boundary

    def intact(self) -> int:
        """How many blocks, from the first on, are complete somewhere, as far as can be told without reading them."""
        return next((i for i, key in enumerate(self._keys) if not self._manager.holds(key)), self.segments)

    def truncate(self, segments: int) -> None:
        """Let go of all blocks but the first `segments`; the journal stays."""
        for key in self._keys[segments:]:
            self._manager.release(key)
        del self._keys[segments:], self.index[segments:]

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the blocks, in stream order."""
        return tuple(self._keys)

    @property
    def last_key(self) -> str:
        """The key of the last block; of none, the root."""
        return self._keys[-1] if self._keys else self.root

    def _rows(self, segment: int, rows_n: Tensor) -> Tensor:
        try:
            return self._manager.rows(self._keys[segment], rows_n)
        except PastKVError as error:
            error.details["segment"] = str(segment)
            raise
