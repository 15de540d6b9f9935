"""Past KV of all streams of an engine: blocks shared between streams, written through to slower tiers, found again.

A block is prepared when its segment closes, and complete once the state after it is known. Its bytes come to host
memory in the background, its original on the device serving meanwhile; then a thread of its own writes it to the slower
tiers. Host memory lets go only of blocks that are held there, or that no stream uses any more. Rows that are read from
slower tiers, or prefetched from there by threads of their own, stay in host memory for a while.

One lock guards the books; it is never held while a slower tier works.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from segcore.config import CacheConfig
from segcore.errors import BlockMissing, PastKVError, StorageFull
from segcore.fingerprint import Fingerprint
from segcore.pastkv.base import Block, BlockHead, PastLayout, nbytes
from segcore.pastkv.format import BlockFormat, Cipher
from segcore.pastkv.guard import Guard
from segcore.pastkv.journal import root_key
from segcore.pastkv.memory import MemoryTier, RowCache, Rows
from segcore.pastkv.session import SessionPast
from segcore.pastkv.slower import SlowerTiers
from segcore.pastkv.transfer import Transfer
from segcore.pinned import within_reach

log = logging.getLogger(__name__)

# The share of host memory that rows of blocks in slower tiers may take.
ROWS_SHARE = 8
_BULK = "kv_SC2D"
# Blocks that are prefetched at once, and heads of blocks that are read ahead.
READERS = 4
HEADS_AHEAD = 2 * READERS


@dataclass
class _Use:
    """Who needs a block. index: what their choices search, one copy for all. streams: how many they are."""

    index: dict[str, Tensor] = field(repr=False)
    streams: int = 0


class PastKVManager:
    """The tiers, shared by the streams of an engine. Methods may be called from any thread."""

    def __init__(
        self,
        config: CacheConfig,
        fingerprint: Fingerprint | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
        cipher: Cipher | None = None,
    ) -> None:
        self._cipher = cipher
        self.device, self._config, self._fingerprint = device, config, fingerprint or Fingerprint()
        blocks = BlockFormat(self._fingerprint, cipher)
        self._device = MemoryTier("device", config.device_bytes, device) if config.device_bytes else None
        self._host = MemoryTier("host", config.host_bytes, torch.device("cpu"))
        self._memory = [tier for tier in (self._device, self._host) if tier is not None]
        self._guard = Guard()
        self._slower = SlowerTiers(config, self._fingerprint, blocks, self._guard, self._missed)
        self._disk = self._slower.disk
        self._rows = RowCache(config.host_bytes // ROWS_SHARE if self._slower else 0)
        self._transfer = Transfer(device)
        self._lock = threading.RLock()
        self._uses: dict[str, _Use] = {}
        self._pasts: weakref.WeakSet[SessionPast] = weakref.WeakSet()
        self._reserved_bytes = 0
        self._writing: dict[str, Future[None]] = {}
        self._reading: dict[str, Future[None]] = {}
        self._unwritten: dict[str, None] = {}  # keys whose write failed, the longest ago first
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="segcore-writer")
        self._reader = ThreadPoolExecutor(READERS, thread_name_prefix="segcore-reader")

    def open_stream(self, layout: PastLayout | None, tenant: str = "") -> SessionPast:
        """An empty past for a new stream. Streams of different tenants share nothing.

        Raises FailedPrecondition for a tenant whose blocks should be encrypted, and can't be.
        """
        if self._cipher is not None:
            self._cipher.check(tenant)
        return SessionPast(self, layout, root_key(self._fingerprint.digest, tenant), tenant)

    @property
    def boundary_segments(self) -> int:
        """Every so many blocks hold a boundary."""
        return self._config.boundary_segments

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory: blocks, rows of others, and what is searched of blocks that are elsewhere."""
        with self._lock:
            index_bytes = sum(nbytes(use.index) for key, use in self._uses.items() if not self._host.holds(key))
            searched_bytes = sum(tensor.nbytes for tensor in self._searched if tensor.is_cpu)
            return self._host.used_bytes + self._rows.used_bytes + index_bytes + searched_bytes

    @property
    def used_bytes(self) -> dict[str, int]:
        """Bytes by tier."""
        used = {tier.name: tier.used_bytes for tier in self._memory} | self._slower.used_bytes
        used["host"] = self.host_bytes
        with self._lock:
            searched_bytes = sum(tensor.nbytes for tensor in self._searched if not tensor.is_cpu)
        if searched_bytes:
            used["device"] = used.get("device", 0) + searched_bytes
        return used

    @property
    def keys_in_use(self) -> dict[str, int]:
        """How many streams use each block."""
        with self._lock:
            return {key: use.streams for key, use in self._uses.items()}

    @property
    def faults(self) -> Counter[str]:
        """How often what went wrong in tiers, as "tier.kind"."""
        return self._guard.faults

    def follow(self, past: SessionPast) -> None:
        """Count what a past is searched with as long as the past lives."""
        with self._lock:
            self._pasts.add(past)

    def fit(self) -> None:
        """What is searched has grown: make up for it. Raises StorageFull."""
        with self._room(0):
            pass

    def prepare(self, block: Block, kept: dict[str, Tensor] | None = None) -> None:
        """Take a block, for one stream: readable at once. Raises StorageFull; then nothing is kept.

        kept: what stays in memory of its index while it is in use; None: all.
        """
        kept = block.index if kept is None else kept
        with self._lock:
            if self._host.holds(block.key):
                self._add_stream(block.key, kept)
                return
        with self._room(block.nbytes), self._lock:
            self._host.put(block)
            self._add_stream(block.key, kept)
        self._transfer.start({_BULK: block.kv_SC2D} | block.index, partial(self._bulk_arrived, block.key))
        if self._device is not None and block.kv_SC2D.nbytes <= self._device.budget_bytes:
            bulk = Block(block.key, block.kv_SC2D, {}, {})
            self._guard.attempt_or(None, self._device, lambda tier: tier.put(bulk, tier.keys))

    def complete(self, key: str, boundary: dict[str, Tensor]) -> None:
        """A prepared block is whole; it goes to the slower tiers in the background. Raises StorageFull."""
        block = self._host.find(key)
        if block is None or block.boundary:
            return  # another stream, or engine, completed it
        with self._room(nbytes(boundary)), self._lock:
            block = self._host.find(key)
            if block is None:
                return
            self._host.put(replace(block, boundary=boundary))
        self._transfer.start(boundary, partial(self._boundary_arrived, key))

    def await_transfer(self) -> None:
        """Wait until what closed before is in host memory: the device needn't hold two blocks."""
        self._transfer.settle()

    def within_reach(self, keys: Sequence[str]) -> list[Tensor] | None:
        """The bulk of blocks where a GPU reads it by itself; None if it doesn't reach all of them.

        It stays there as long as the answer is held.
        """
        with self._lock:
            blocks = [self._host.find(key) for key in keys]
        found = [block.kv_SC2D for block in blocks if block is not None]
        return found if len(found) == len(keys) and all(within_reach(bulk) for bulk in found) else None

    def _bulk_arrived(self, key: str, tensors: dict[str, Tensor]) -> None:
        """A block's bulk and index are in host memory, on any thread: they take their originals' place."""
        index = dict(tensors)
        kv_SC2D = index.pop(_BULK)
        with self._lock:
            block = self._host.find(key)
            if block is not None:
                self._host.put(replace(block, kv_SC2D=kv_SC2D, index=index))

    def _boundary_arrived(self, key: str, boundary: dict[str, Tensor]) -> None:
        """The rest of a block came after its bulk: it is written."""
        with self._lock:
            block = self._host.find(key)
            if block is not None:
                block = replace(block, boundary=boundary)
                self._host.put(block)
                self._write(block)
                self._write_again(1)

    def share(self, key: str, index: dict[str, Tensor]) -> dict[str, Tensor]:
        """One more stream uses a block; returns the copy of its index that they all use. Raises StorageFull."""
        with self._lock:
            block = self._host.find(key)
            if block is not None and block.boundary and key not in self._uses:
                self._write(block)  # to learn which tiers hold it
            if block is not None or key in self._uses:
                return self._add_stream(key, index if block is None or not index else block.index)
        with self._room(nbytes(index)), self._lock:
            return self._add_stream(key, index)

    def release(self, key: str) -> None:
        """One stream less uses a block. It stays for the next that begins the same way, until its room is needed."""
        with self._lock:
            use = self._uses[key]
            use.streams -= 1
            if use.streams:
                return
            del self._uses[key]
            self._slower.release(key)
            self._rows.delete(key)
            block = self._host.find(key)
            if self._config.reuse and (block is None or block.boundary):
                return
            for tier in self._memory:
                tier.delete(key)
            writing = self._writing.get(key)
            if writing is not None and writing.cancel():
                del self._writing[key]
        if self._disk is not None and not self._config.reuse:
            self._disk.delete(key)  # if it is being written, the writer sees to it

    def in_memory(self, key: str) -> bool:
        """Whether a block's rows can be had without a slower tier."""
        return any(tier.holds(key) for tier in self._memory)

    def prefetch(self, key: str, rows_n: Tensor) -> None:
        """Read rows, ascending, of a block that is in slower tiers alone into host memory, in the background."""
        with self._lock:
            if self._slower and key not in self._reading and not self.in_memory(key):
                self._reading[key] = self._reader.submit(self._prefetch, key, rows_n)

    def rows(self, key: str, rows_n: Tensor) -> Tensor:
        """Rows of a block, in the order asked for, from the nearest tier that gives them whole. Raises PastKVError."""
        for tier in self._memory:
            if tier.holds(key):
                try:
                    return tier.rows(key, rows_n)
                except BlockMissing:
                    continue  # it left meanwhile
        with self._lock:
            reading = self._reading.get(key)
            if reading is not None and reading.cancel():
                del self._reading[key]
                reading = None
        if reading is not None:
            wait([reading])
        return self._some_rows(key, torch.unique(rows_n)).take(rows_n)

    def head(self, key: str, *, boundary: bool = True) -> BlockHead:
        """Index and boundary of a block, from the nearest tier that gives them whole. Raises PastKVError.

        boundary: it may be the larger part; whether it is read.
        """
        try:
            return self._host.head(key, boundary=boundary)
        except BlockMissing:
            return self._slower.head(key, boundary=boundary)

    def heads(self, keys: Sequence[str]) -> Generator[BlockHead]:
        """The heads of blocks without their boundaries, in order, the next ones being read meanwhile.

        Raises PastKVError; then it has ended.
        """
        ahead, rest = deque[Future[BlockHead]](), iter(keys)
        try:
            while True:
                for key in islice(rest, HEADS_AHEAD - len(ahead)):
                    ahead.append(self._reader.submit(copy_context().run, partial(self.head, key, boundary=False)))
                if not ahead:
                    return
                yield ahead.popleft().result()
        finally:
            for reading in ahead:
                reading.cancel()

    def restore_seconds(self, key: str) -> float | None:
        """How long it takes to take up a block, as far as known; None if no tier has it."""
        return 0.0 if self._is_whole(key) else self._slower.restore_seconds(key)

    def holds(self, key: str) -> bool:
        """Whether a tier has the block, complete, as far as can be told without reading it."""
        return self._is_whole(key) or self._slower.holds(key)

    def settle(self) -> None:
        """Wait until everything complete is written, or has failed to be, and what was to be prefetched is read."""
        self._transfer.settle()
        with self._lock:
            pending = [*self._writing.values(), *self._reading.values()]
        wait(pending)

    def close(self) -> None:
        """Release everything this process holds, on disk too; shared blocks stay."""
        self._slower.stop()
        self._transfer.close()
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True)
        for tier in self._memory:
            tier.close()
        self._slower.close()

    def check_integrity(self) -> None:
        """Raise AssertionError if the books don't balance."""
        self.settle()
        with self._lock:
            assert all(use.streams > 0 for use in self._uses.values()), "a block without a stream"
            for tier in self._memory:
                blocks = [tier.find(key) for key in tier.keys]
                assert tier.used_bytes == sum(b.nbytes for b in blocks if b is not None), f"{tier.name} bytes"
                assert tier.used_bytes <= tier.budget_bytes, f"{tier.name} is over its budget"
            assert set(self._rows.keys) <= set(self._uses), "rows that nobody uses"
            assert self._reserved_bytes == 0, "room that nobody took"
            assert self.host_bytes <= self._config.host_bytes, "host memory is over its budget"
            for key in self._host.keys:
                assert key in self._uses or self._is_whole(key), "an incomplete block left behind"
            if self._disk is not None and self._disk.budget_bytes is not None:
                assert self._disk.used_bytes <= self._disk.budget_bytes, "disk is over its budget"

    @property
    def _searched(self) -> Iterator[Tensor]:
        """What selector keys are searched with, each tensor once, though forks share some; the lock is held."""
        held = (past.search.allocated for past in self._pasts if past.search is not None)
        return iter({tensor.data_ptr(): tensor for tensors in held for tensor in tensors}.values())

    def _is_whole(self, key: str) -> bool:
        """Whether host memory has a block, complete."""
        block = self._host.find(key)
        return block is not None and bool(block.boundary)

    def _add_stream(self, key: str, index: dict[str, Tensor]) -> dict[str, Tensor]:
        """The lock is held."""
        use = self._uses.setdefault(key, _Use(index))
        use.streams += 1
        self._slower.use(key)
        return use.index

    @contextmanager
    def _room(self, needed_bytes: int) -> Iterator[None]:
        """Room in host memory, reserved until what needs it is there. Raises StorageFull."""
        if not self._reserve(needed_bytes):
            raise StorageFull(
                f"past KV needs {needed_bytes} more bytes of host memory, and {self.host_bytes} of"
                f" {self._config.host_bytes} are in use; delete sessions, raise host_bytes, or give the disk tier room"
            )
        try:
            yield
        finally:
            with self._lock:
                self._reserved_bytes -= needed_bytes

    def _reserve(self, needed_bytes: int, *, patient: bool = True) -> bool:
        """Set room in host memory apart; whether there was enough.

        patient: gives up rows, waits for writes, and tries failed ones once more.
        """
        tried_again = False
        while True:
            with self._lock:
                if self.host_bytes + self._reserved_bytes + needed_bytes <= self._config.host_bytes:
                    self._reserved_bytes += needed_bytes
                    return True
                candidates = [key for key in self._host.keys if key not in self._writing]
                writing = list(self._writing.values())
            spare = next((key for key in candidates if self._is_spare(key)), None)
            if spare is not None:
                with self._lock:
                    if spare not in self._writing:
                        self._host.delete(spare)
            elif not patient:
                return False
            elif self._rows.delete_oldest():
                continue
            elif writing:
                wait(writing, return_when="FIRST_COMPLETED")
            elif tried_again:
                return False
            else:
                with self._lock:
                    self._write_again(len(self._unwritten))
                tried_again = True

    def _is_spare(self, key: str) -> bool:
        """Whether host memory may forget a block: nobody uses it, or it is held elsewhere."""
        with self._lock:
            used = key in self._uses
        return not used or self._slower.still_holds(key)

    def _missed(self, key: str) -> None:
        """A slower tier lacks a block that it should have."""
        with self._lock:
            if key in self._uses:
                self._unwritten[key] = None

    def _write(self, block: Block) -> None:
        """Hand a block to the writer; the lock is held."""
        if self._slower and block.key not in self._writing:
            self._writing[block.key] = self._writer.submit(self._write_through, block)

    def _write_again(self, most: int) -> None:
        """Try once more to write blocks whose write failed, the longest ago first; the lock is held."""
        for key in list(self._unwritten)[:most]:
            del self._unwritten[key]
            block = self._host.find(key)
            if key in self._uses and block is not None and block.boundary:
                self._write(block)

    def _write_through(self, block: Block) -> None:
        """Write a block to all slower tiers. On the writer's thread; raises nothing."""
        if not self._slower.write(block):
            self._missed(block.key)
        with self._lock:
            self._writing.pop(block.key, None)
            unwanted = not self._config.reuse and block.key not in self._uses
        if unwanted and self._disk is not None:
            self._disk.delete(block.key)

    def _some_rows(self, key: str, wanted_n: Tensor) -> Rows:
        """At least these rows, ascending; those that aren't in memory are read, and stay there for a while."""
        have = self._rows.get(key)
        lacking = wanted_n if have is None else have.lacking(wanted_n)
        if len(lacking):
            read = Rows(lacking, self._slower.rows(key, lacking))
            have = read if have is None else have.joined(read)
            self._keep(key, have)
        assert have is not None
        return have

    def _keep(self, key: str, rows: Rows) -> None:
        """Keep rows in host memory if there is room."""
        more_bytes = rows.nbytes - self._rows.bytes_of(key)
        if rows.nbytes <= self._rows.budget_bytes and self._reserve(more_bytes, patient=False):
            with self._lock:
                self._reserved_bytes -= more_bytes
                if key in self._uses and rows.nbytes - self._rows.bytes_of(key) <= more_bytes:
                    self._rows.put(key, rows)

    def _prefetch(self, key: str, rows_n: Tensor) -> None:
        """On a reader's thread; raises nothing: whoever needs what couldn't be read will find out."""
        try:
            self._some_rows(key, rows_n)
        except PastKVError as error:
            log.debug("prefetch: %s", error.message)
        except Exception:
            log.exception("block %s couldn't be prefetched", key)
        finally:
            with self._lock:
                self._reading.pop(key, None)
