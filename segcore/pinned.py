"""Host memory that a GPU reads and writes by itself: in slabs of huge pages, made ready before they are needed.

Pinning memory for each block would hold up the device's work, and touching it page by page is slower than the link.
With huge pages a gibibyte takes a twentieth of a second to touch and a fortieth to register; and buffers that are given
up are used again.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import threading
import weakref
from bisect import bisect_right
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SLAB_BYTES = 2**28
_HUGE_PAGE = 2**21
_ALIGNMENT = 512
# Threads that touch a slab.
_TOUCHING = 8


class PinnedMemory:
    """Buffers in pinned host memory. Any thread may take one; it is given back when no tensor uses it any more.

    A buffer may be used again at once by whoever asks next. So whoever takes one for the device to write must order
    that behind the device's work until now: an event that is recorded after `take`, or the same stream.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By size; finalizers run at any moment, under any lock, so they take none.
        self._free: defaultdict[int, deque[tuple[_Slab, int]]] = defaultdict(deque)
        # Where slabs begin and end, ascending; replaced, never changed.
        self._slabs: list[tuple[int, int]] = []
        self._slab: _Slab | None = None
        self._used = 0
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="segcore-pinned")
        self._next: Future[_Slab] | None = None

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; in ordinary memory, if no more can be pinned."""
        numbers = functools.reduce(int.__mul__, shape, 1)
        size = -(-numbers * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        try:
            slab, offset = self._place(size)
        except MemoryError as error:
            log.warning("%s; ordinary memory takes its place", error)
            return torch.empty(shape, dtype=dtype)
        memory = (ctypes.c_uint8 * size).from_address(slab.address + offset)
        weakref.finalize(memory, self._free[size].append, (slab, offset)).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8)[: numbers * dtype.itemsize].view(dtype).view(shape)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in a slab."""
        slabs, address = self._slabs, tensor.data_ptr()
        at = bisect_right(slabs, address, key=itemgetter(0))
        return at > 0 and address < slabs[at - 1][1]

    def _place(self, size: int) -> tuple[_Slab, int]:
        free = self._free[size]
        with self._lock:
            if free:
                return free.popleft()
            if self._slab is None or self._used + size > self._slab.size:
                self._slab, self._used = self._new_slab(size), 0
            self._used += size
            return self._slab, self._used - size

    def _new_slab(self, size: int) -> _Slab:
        """A slab for some buffers of `size` bytes; the next one is begun. What is left of the last one is lost."""
        ready, self._next = self._next, None
        slab = None if ready is None else ready.result()
        if slab is None or slab.size < size:
            slab = _Slab(max(4 * size, SLAB_BYTES))
        self._slabs = sorted([*self._slabs, (slab.address, slab.address + slab.size)])
        self._next = self._ahead.submit(_Slab, slab.size)
        return slab


class _Slab:
    """Memory that is mapped, touched and registered, for as long as the process lives. Raises MemoryError."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // _HUGE_PAGE) * _HUGE_PAGE
        self._map = mmap.mmap(-1, self.size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        first = ctypes.addressof(ctypes.c_uint8.from_buffer(self._map))
        self.address = -(-first // _HUGE_PAGE) * _HUGE_PAGE
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        part = -(-self.size // _TOUCHING // _HUGE_PAGE) * _HUGE_PAGE
        with ThreadPoolExecutor(_TOUCHING, thread_name_prefix="segcore-touch") as threads:
            for at in range(0, self.size, part):
                threads.submit(ctypes.memset, self.address + at, 0, min(part, self.size - at))
        code = torch.cuda.cudart().cudaHostRegister(self.address, self.size, 0)
        if int(code) != 0:
            raise MemoryError(f"{self.size} bytes of host memory can't be pinned: {code}")


def within_reach(tensor: Tensor) -> bool:
    """Whether a GPU reads a tensor where it is: in its own memory, or in a buffer from here."""
    return tensor.is_cuda or (pinned_memory.cache_info().currsize > 0 and pinned_memory().holds(tensor))


@functools.cache
def pinned_memory() -> PinnedMemory:
    """The process's."""
    return PinnedMemory()
