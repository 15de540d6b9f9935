"""Rows in few big allocations: on the device up to a limit, in host memory beyond it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

# With segments of 1,024 tokens a page holds 65,536.
PAGE_ROWS = 64


class Pages:
    """A table that grows by one row, is cut short, and is forked without copying what doesn't change.

    device_rows: rows that may live on `device`; later pages live in host memory. pin: those are pinned where the device
    is a GPU, to be read from there; it takes long.
    """

    def __init__(
        self,
        row_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        device_rows: int,
        *,
        pin: bool = True,
    ) -> None:
        self._row_shape, self._dtype, self._device, self._device_rows = row_shape, dtype, device, device_rows
        self._pin = pin and device.type == "cuda"
        self._pages: list[Tensor] = []
        self._writable = True
        self.rows = 0

    @property
    def device_bytes(self) -> int:
        """Allocated on the device; a page that forks share counts in each."""
        return sum(page.nbytes for i, page in enumerate(self._pages) if self._on_device(i, len(page)))

    @property
    def host_bytes(self) -> int:
        """Allocated in host memory; a page that forks share counts in each."""
        return sum(page.nbytes for page in self._pages) - self.device_bytes

    def append(self, row: Tensor) -> None:
        """Copy a row behind the last one."""
        page, at = divmod(self.rows, PAGE_ROWS)
        if page == len(self._pages):
            # Short streams are the rule: the first page doubles from one row.
            self._put(page, self._allocate(page, 1 if page == 0 else PAGE_ROWS))
        elif at == len(self._pages[page]):
            self._put(page, self._allocate(page, min(2 * at, PAGE_ROWS)))
        elif not self._writable:
            self._put(page, self._allocate(page, len(self._pages[page])))
        self._pages[page][at].copy_(row)
        self.rows += 1

    @property
    def allocated(self) -> list[Tensor]:
        """The pages as they were allocated; forks share some."""
        return list(self._pages)

    def __iter__(self) -> Iterator[Tensor]:
        """The rows, in order, a page at a time; views, where they live."""
        for i, page in enumerate(self._pages):
            yield page[: self.rows - i * PAGE_ROWS]

    def page(self, i: int) -> Tensor:
        """Rows i * PAGE_ROWS and on."""
        return self._pages[i]

    def truncate(self, rows: int) -> None:
        """Forget all but the first rows."""
        assert 0 <= rows <= self.rows
        self.rows = rows
        del self._pages[-(-rows // PAGE_ROWS) :]
        # A fork may still read the rows behind the cut.
        self._writable = False

    def fork(self) -> Pages:
        """An independent table of the same rows. A page that isn't full is copied by whoever appends to it."""
        self._writable = False
        twin = copy.copy(self)
        twin._pages = list(self._pages)
        return twin

    def _on_device(self, page: int, rows: int) -> bool:
        return page * PAGE_ROWS + rows <= self._device_rows

    def _allocate(self, page: int, rows: int) -> Tensor:
        shape = (rows, *self._row_shape)
        if self._on_device(page, rows):
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        return torch.empty(shape, dtype=self._dtype, pin_memory=self._pin)

    def _put(self, i: int, page: Tensor) -> None:
        """Make `page` the i-th, with the rows of the one that it replaces."""
        if i < len(self._pages):
            held = self.rows - i * PAGE_ROWS
            page[:held] = self._pages[i][:held]
        self._pages[i : i + 1] = [page]
        self._writable = True
