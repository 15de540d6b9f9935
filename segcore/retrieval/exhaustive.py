"""The oracle: every key as it came, nominated by its exact score."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from segcore.retrieval.base import KeyIndex
from segcore.retrieval.choose import best_of_blocks, choose_positions, levels_of, log_shares, nominate, score_pieces
from segcore.retrieval.pages import PAGE_ROWS, Pages

# By levels of so many the worst of forty facts' blocks comes 107th among 297,000 candidates; of all keys 69th; by
# products alone 479th.
LEVEL_KEYS = 4096


class ExhaustiveIndex(KeyIndex):
    """Holds `selectors * head_dim` numbers a token, and reads them all at each search."""

    _keys: Pages  # rows [C, N, D]

    @property
    def device_bytes(self) -> int:
        return self._keys.device_bytes if self._segment else 0

    @property
    def host_bytes(self) -> int:
        return self._keys.host_bytes if self._segment else 0

    @property
    def allocated(self) -> list[Tensor]:
        return self._keys.allocated if self._segment else []

    def judge(self, queries_CGWD: Sequence[Tensor], blocks_B: Tensor, *, first: int, stop: int, tokens: int) -> Tensor:
        """positions_R of the best of some blocks, ascending, each of which holds a token in [first, stop)."""
        spec = self._spec
        positions_n = (blocks_B[:, None] * spec.block + torch.arange(spec.block, device=blocks_B.device)).flatten()
        candidate_n = (positions_n >= first) & (positions_n < stop)
        # What is no candidate still has a key to gather.
        keys_CnD = self._gather(positions_n.clamp(first, stop - 1))
        shares_n = log_shares(queries_CGWD, keys_CnD, candidate_n, spec.head_dim**-0.5)
        best_B = shares_n.new_full((-(-stop // spec.block),), -torch.inf)
        best_B = best_B.index_copy(0, blocks_B, shares_n.view(-1, spec.block).amax(dim=1))
        return choose_positions(best_B, first=first, stop=stop, tokens=tokens, block=spec.block)

    def levels(self, queries_CGWD: Sequence[Tensor], *, first: int, stop: int) -> Tensor:
        """What each query likes of keys that are spread evenly over [first, stop), [C, G, W]."""
        positions_n = torch.arange(first, stop, -(-(stop - first) // LEVEL_KEYS), device=self._spec.device)
        return levels_of(queries_CGWD, self._gather(positions_n), self._spec.head_dim**-0.5)

    def _start(self) -> None:
        spec, shape = self._spec, (self._spec.selectors, self._segment, self._spec.head_dim)
        device_rows = spec.device_budget_bytes // (math.prod(shape) * spec.dtype.itemsize)
        # Without a place on the device it only has rows gathered, by the host.
        self._keys = Pages(shape, spec.dtype, spec.device, device_rows, pin=device_rows > 0)

    def _append(self, keys_CND: Tensor) -> None:
        self._keys.append(keys_CND)

    def _search(self, queries_CGWD: Sequence[Tensor], *, first: int, stop: int, tokens: int) -> Tensor:
        blocks_B = self._all_nominated(first=first, stop=stop, tokens=tokens)
        if blocks_B is None:
            keys, scale = self.keys(queries_CGWD[0].shape[:2].numel()), self._spec.head_dim**-0.5
            scores = score_pieces(queries_CGWD, keys, scale, self.levels(queries_CGWD, first=first, stop=stop))
            best_B = best_of_blocks(scores, first=first, stop=stop, block=self._spec.block)
            blocks_B = nominate(best_B, self._most(tokens))
        return self.judge(queries_CGWD, blocks_B, first=first, stop=stop, tokens=tokens)

    def _truncate(self, segments: int) -> None:
        self._keys.truncate(segments)

    def _unshare(self) -> None:
        if self._segment:
            self._keys = self._keys.fork()

    def keys(self, numbers_per_key: int) -> Iterator[Tensor]:
        step = self._step(numbers_per_key * self._segment)
        for page in self._keys:
            for rows_PCND in page.split(step):
                yield rows_PCND.to(self._spec.device, non_blocking=True).transpose(0, 1).flatten(1, 2)

    def _gather(self, positions_n: Tensor) -> Tensor:
        """Keys of ascending positions, [C, n, D], from wherever their pages are."""
        positions_n = positions_n.cpu()
        selectors, head_dim, size = self._spec.selectors, self._spec.head_dim, self._segment
        row_n = positions_n // size
        pages, counts = torch.unique_consecutive(row_n // PAGE_ROWS, return_counts=True)
        # As rows of a page's [selectors * size] rows of one key each: what torch copies soonest.
        first_n = row_n % PAGE_ROWS * (selectors * size) + positions_n % size
        key_nC = first_n[:, None] + size * torch.arange(selectors)
        gathered = []
        for i, keys in zip(pages.tolist(), key_nC.split(counts.tolist()), strict=True):
            page = self._keys.page(i).view(-1, head_dim)
            rows = page.index_select(0, keys.flatten().to(page.device)).view(-1, selectors, head_dim)
            gathered.append(rows.to(self._spec.device, non_blocking=True))
        return torch.cat(gathered).transpose(0, 1)
