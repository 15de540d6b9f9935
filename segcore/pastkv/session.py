"""The past of one stream: its journal, its blocks in order, and what later choices search.

Shapes: C cells, R retrieved tokens, S tokens of a segment, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from segcore.errors import PastKVError
from segcore.pastkv.base import Block, BlockHead, PastLayout
from segcore.pastkv.journal import Journal

if TYPE_CHECKING:
    from segcore.pastkv.manager import PastKVManager


# Stands in for the boundary of a block that is whole without one.
_NO_BOUNDARY = "no_boundary"


class SessionPast:
    """One stream's past. Its blocks are shared with every stream that began in the same way.

    root: the key before the first block. tenant: whose it is. What later choices search is in `search`, or, where the
    layout makes none, in `index`, one piece per closed segment.
    """

    def __init__(self, manager: PastKVManager, layout: PastLayout | None, root: str, tenant: str = "") -> None:
        self._manager, self._layout, self.root, self._tenant = manager, layout, root, tenant
        self.journal = Journal()
        self.index: list[dict[str, Tensor]] = []
        self.search = None if layout is None or layout.new_search is None else layout.new_search()
        self._keys: list[str] = []
        manager.follow(self)

    @property
    def segments(self) -> int:
        """Closed segments that are in past KV."""
        return len(self._keys)

    def append(self, kv_SC2D: Tensor, index: dict[str, Tensor]) -> None:
        """Take the segment that just closed; readable at once, durable after `complete`.

        The caller gives all of it up: it isn't copied, and a block never changes. Raises StorageFull; then nothing is
        kept.
        """
        assert self._layout is not None
        layout, first = self._layout, self.segments * self._layout.segment_tokens
        expected = (layout.segment_tokens, layout.cells, 2, layout.head_dim)
        assert kv_SC2D.shape == expected, (kv_SC2D.shape, expected)
        key = self.journal.key(self.last_key, first, first + layout.segment_tokens)
        # On a GPU it comes to host memory with the block; what is read piece by piece, at once.
        own = _own(index) if self.search is None or not kv_SC2D.is_cuda else index
        self._manager.prepare(Block(key, kv_SC2D.detach().contiguous(), own, {}, self._tenant), self._kept(own))
        self._take(key, own if self.search is None else index)

    @property
    def keeps_boundary(self) -> bool:
        """Whether the last block is one of those that hold a boundary."""
        return self.segments % self._manager.boundary_segments == 0

    def complete(self, boundary: dict[str, Tensor]) -> None:
        """The last segment is closed: its block is whole, and goes to the lower tiers.

        boundary: empty for a block that holds none. It is copied; on a GPU later, so nobody may write to it.
        """
        boundary = boundary or {_NO_BOUNDARY: torch.zeros(1, dtype=torch.int8)}
        kept = {name: t.detach() if t.is_cuda else t.detach().clone() for name, t in boundary.items()}
        self._manager.complete(self.last_key, kept)

    @property
    def in_memory(self) -> bool:
        """Whether every block is in memory."""
        return all(self._manager.in_memory(key) for key in self._keys)

    def decide(self, choose: Callable[[], Tensor]) -> Tensor:
        """What a policy chooses by the stream's values, as indices: `choose`'s answer.

        Every such choice goes through here, for training to repeat it when it runs a segment again.
        """
        return choose()

    def prefetch(self, positions: Tensor) -> None:
        """Past tokens that the next `gather` may ask for: their rows come to host memory in the background.

        positions: as for `gather`. It is a guess: a wrong one costs its reads, a fault is counted and does no harm.
        """
        for segment, rows_n in self._by_segment(torch.unique(positions.cpu())):
            self._manager.prefetch(self._keys[segment], rows_n)

    def gather(self, positions: Tensor) -> Tensor:
        """Keys and values of past tokens, [R, C, 2, D], on the model's device.

        positions: ascending, [R] or [1, R] for all cells alike, or [C, R], each cell its own. Raises PastKVError,
        with the number of the segment that couldn't be read in its details.
        """
        assert self._layout is not None
        layout, positions_CR, device = self._layout, torch.atleast_2d(positions.cpu()), self._manager.device
        wanted = torch.unique(positions_CR)
        parts = [torch.empty((0, layout.cells, 2, layout.head_dim), dtype=layout.dtype, device=device)]
        parts += [
            self._rows(segment, rows_n).to(device, non_blocking=True) for segment, rows_n in self._by_segment(wanted)
        ]
        kv_nC2D = torch.cat(parts)
        if positions_CR.shape[0] == 1:
            return kv_nC2D
        rows_CR = torch.searchsorted(wanted, positions_CR.contiguous()).to(device)
        return kv_nC2D[rows_CR.T, torch.arange(layout.cells, device=device)]

    def await_transfer(self) -> None:
        """Wait until what closed before is in host memory: the device needn't hold two blocks."""
        self._manager.await_transfer()

    def within_reach(self) -> list[Tensor] | None:
        """Every block's bulk, [S, C, 2, D] each, where a GPU reads it by itself; None if it doesn't reach all of them.

        They stay there as long as the answer is held, and for what the device was given to do meanwhile.
        """
        return self._manager.within_reach(self._keys)

    def fork(self) -> SessionPast:
        """An independent past that shares this one's blocks."""
        fork = SessionPast(self._manager, self._layout, self.root, self._tenant)
        fork.journal, fork._keys = self.journal.copy(), list(self._keys)
        if self.search is None:
            fork.index = [self._manager.share(key, index) for key, index in zip(self._keys, self.index, strict=True)]
        else:
            fork.search = self.search.fork()
            for key in self._keys:
                self._manager.share(key, {})
        return fork

    def adopt(self, key: str, head: BlockHead | None = None) -> dict[str, Tensor]:
        """Continue with a block that another stream made of the same tokens; returns its boundary, or nothing.

        head: the block's, if it has been read already. Raises PastKVError; then nothing changes.
        """
        head = head or self._manager.head(key)
        shared = self._manager.share(key, self._kept(head.index))
        self._take(key, head.index if self.search is not None else shared)
        return _boundary(head)

    def heads(self, keys: Sequence[str]) -> Generator[BlockHead]:
        """The heads of blocks that are adopted one by one, without boundaries, read ahead.

        Raises PastKVError; then it has ended.
        """
        return self._manager.heads(keys)

    def restore_seconds(self, key: str) -> float | None:
        """How long it takes to adopt a block, 0 if that isn't known; None if it can't be had."""
        return self._manager.restore_seconds(key)

    def boundary(self) -> dict[str, Tensor]:
        """The last block's boundary, empty if it has none. Raises PastKVError."""
        return _boundary(self._manager.head(self.last_key))

    def intact(self) -> int:
        """How many blocks, from the first on, are complete somewhere, as far as can be told without reading them."""
        return next((i for i, key in enumerate(self._keys) if not self._manager.holds(key)), self.segments)

    def truncate(self, segments: int) -> None:
        """Let go of all blocks but the first `segments`; the journal stays."""
        for key in self._keys[segments:]:
            self._manager.release(key)
        del self._keys[segments:], self.index[segments:]
        if self.search is not None and self._layout is not None:
            self.search.truncate(len(self._keys) * self._layout.segment_tokens)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the blocks, in stream order."""
        return tuple(self._keys)

    @property
    def last_key(self) -> str:
        """The key of the last block; of none, the root."""
        return self._keys[-1] if self._keys else self.root

    def _kept(self, index: dict[str, Tensor]) -> dict[str, Tensor]:
        """What stays in memory of a block's index while it is in use: nothing, if `search` has its own copy."""
        return index if self.search is None else {}

    def _take(self, key: str, index: dict[str, Tensor]) -> None:
        self._keys.append(key)
        if self.search is None:
            self.index.append(index)
        else:
            self.search.append(index["keys"])
            self._manager.fit()

    def _by_segment(self, positions_n: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The segments that ascending positions lie in, and their rows of each."""
        assert self._layout is not None
        segments, rows_n = positions_n // self._layout.segment_tokens, positions_n % self._layout.segment_tokens
        for segment in torch.unique(segments).tolist():
            yield segment, rows_n[segments == segment]

    def _rows(self, segment: int, rows_n: Tensor) -> Tensor:
        try:
            return self._manager.rows(self._keys[segment], rows_n)
        except PastKVError as error:
            error.details["segment"] = str(segment)
            raise


def _boundary(head: BlockHead) -> dict[str, Tensor]:
    return {} if _NO_BOUNDARY in head.boundary else head.boundary


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory that share no storage with anything."""
    layout = torch.contiguous_format
    return {name: t.detach().to("cpu", copy=True, memory_format=layout) for name, t in tensors.items()}
