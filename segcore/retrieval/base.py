"""What an index of selector keys does. One file each, beside this one, for those that there are.

Shapes: C selectors, G query heads of a selector, W tokens of the query window, N tokens, D head dimension, R chosen.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from segcore.retrieval.recall import Recall

# Numbers that a scan works on at a time: what a core's cache holds, or enough to keep a GPU busy.
_SCRATCH_NUMBERS = {"cpu": 2**20, "cuda": 2**25}


@dataclass(frozen=True, kw_only=True)
class IndexSpec:
    """What an index is made for.

    block: tokens of a block. device_budget_bytes: what the index may hold on `device`; beyond it, it lives in host
    memory and is streamed. On a CPU both are the same memory, counted apart. oversampling: blocks that are judged for
    each to be chosen. recall: where indexes that can miss count what they find.
    """

    selectors: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    block: int
    device_budget_bytes: int = 2**30
    oversampling: int = 16
    recall: Recall = field(default_factory=Recall, compare=False)


class KeyIndex(ABC):
    """The selectors' unrotated keys of a session's closed segments, searched by its query windows."""

    def __init__(self, spec: IndexSpec) -> None:
        self._spec = spec
        # Known once the first segment comes.
        self._segment = 0
        self.length = 0

    def append(self, keys_CND: Tensor) -> None:
        """Take the keys of the segment that just closed, from any device. All segments are of one length."""
        keys = keys_CND.detach()
        if self._segment == 0:
            self._segment = keys.shape[1]
            self._start()
        expected = (self._spec.selectors, self._segment, self._spec.head_dim)
        assert keys.shape == expected, (keys.shape, expected)
        self._append(keys)
        self.length += self._segment

    def search(self, queries_CGWD: Sequence[Tensor], *, first: int, stop: int, tokens: int, block: int) -> Tensor:
        """positions_R: the positions in [first, stop) of the retrieved prefix, ascending, int64 on the device.

        queries_CGWD: one window per selector. Chosen as by `choose_blocks`, from the tokens' shares (`log_shares`) of
        the nominated blocks; of a short stream that is all of them.
        """
        assert block == self._spec.block, (block, self._spec.block)
        assert stop <= self.length, (stop, self.length)
        if stop <= first or tokens == 0:
            return torch.empty(0, dtype=torch.long, device=self._spec.device)
        queries = [q.detach().to(self._spec.device) for q in queries_CGWD]
        return self._search(queries, first=first, stop=stop, tokens=tokens)

    def _all_nominated(self, *, first: int, stop: int, tokens: int) -> Tensor | None:
        """The indices of all blocks that hold a candidate, if they are few enough to be judged."""
        start, end = first // self._spec.block, -(-stop // self._spec.block)
        return torch.arange(start, end, device=self._spec.device) if end - start <= self._most(tokens) else None

    def _most(self, tokens: int) -> int:
        """How many blocks are judged. Both ends of the candidates may cut one."""
        return self._spec.oversampling * -(-tokens // self._spec.block) + 2

    @abstractmethod
    def keys(self, numbers_per_key: int) -> Iterator[Tensor]:
        """The exact keys in stream order, on the device, [C, n, D] a piece.

        numbers_per_key: what a scan makes of each key; pieces are as short as it takes.
        """

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens`, which end at a segment's end."""
        if tokens == self.length:
            return
        assert 0 <= tokens < self.length, (tokens, self.length)
        assert tokens % self._segment == 0, (tokens, self._segment)
        self._truncate(tokens // self._segment)
        self.length = tokens

    def fork(self) -> Self:
        """An independent index of the same past, which shares what doesn't change."""
        twin = copy.copy(self)
        twin._unshare()
        return twin

    @property
    @abstractmethod
    def device_bytes(self) -> int:
        """Allocated on the device."""

    @property
    @abstractmethod
    def host_bytes(self) -> int:
        """Allocated in host memory."""

    @property
    @abstractmethod
    def allocated(self) -> list[Tensor]:
        """Every tensor that it holds; forks share some."""

    @abstractmethod
    def _start(self) -> None:
        """Make room; the segment's length is known now."""

    @abstractmethod
    def _append(self, keys_CND: Tensor) -> None: ...

    @abstractmethod
    def _search(self, queries_CGWD: Sequence[Tensor], *, first: int, stop: int, tokens: int) -> Tensor: ...

    @abstractmethod
    def _truncate(self, segments: int) -> None: ...

    @abstractmethod
    def _unshare(self) -> None:
        """Replace the tables by their forks."""

    def _step(self, numbers_per_segment: int) -> int:
        """Segments that a scan takes at a time."""
        scratch = _SCRATCH_NUMBERS.get(self._spec.device.type, _SCRATCH_NUMBERS["cpu"])
        return max(1, scratch // numbers_per_segment)
