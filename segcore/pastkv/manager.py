"""Past KV of all streams of an engine: blocks shared between streams, written through to slower tiers, found again.

A block is prepared in host memory when its segment closes, and complete once the state after it is known; then a
thread of its own writes it to the slower tiers. Host memory lets go only of blocks that are held there, or that no
stream uses any more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from segcore.config import CacheConfig
from segcore.errors import (
    BlockDamaged,
    BlockMismatch,
    BlockMissing,
    ConfigError,
    PastKVError,
    StorageFull,
    TierUnavailable,
)
from segcore.fingerprint import Fingerprint
from segcore.pastkv.base import Block, BlockHead, PastLayout, Tier, nbytes
from segcore.pastkv.directory import LocalDisk, SharedDirectory
from segcore.pastkv.format import BlockFormat
from segcore.pastkv.journal import root_key
from segcore.pastkv.memory import MemoryTier
from segcore.pastkv.redis import RedisTier
from segcore.pastkv.session import SessionPast

log = logging.getLogger(__name__)
T = TypeVar("T")

# A tier that failed to answer is left alone for so long, so that a dead server costs one time-out, not one a block.
PAUSE_S = 5.0


@dataclass
class _Use:
    """Who needs a block. streams: how many. index_bytes: what is searched, kept in memory for them."""

    streams: int = 0
    index_bytes: int = 0
    writing: Future[None] | None = field(default=None, repr=False)


class PastKVManager:
    """The tiers, shared by the streams of an engine. Methods may be called from any thread."""

    def __init__(
        self,
        config: CacheConfig,
        fingerprint: Fingerprint | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    ) -> None:
        self._config, self._fingerprint = config, fingerprint or Fingerprint()
        blocks = BlockFormat(self._fingerprint)
        self._device = MemoryTier("device", config.device_bytes, device) if config.device_bytes else None
        self._host = MemoryTier("host", config.host_bytes, torch.device("cpu"))
        self._disk = None if config.directory is None else LocalDisk(config.directory, blocks, config.disk_bytes)
        self._shared = _shared_tier(config, self._fingerprint, blocks)
        self._slower: list[Tier] = [tier for tier in (self._disk, self._shared) if tier is not None]
        self._memory = [tier for tier in (self._device, self._host) if tier is not None]
        self._uses: dict[str, _Use] = {}
        self._lock = threading.RLock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="segcore-writer")
        self._paused_until: dict[str, float] = {}
        self.faults: Counter[str] = Counter()

    def open_stream(self, layout: PastLayout | None, tenant: str = "") -> SessionPast:
        """An empty past for a new stream. Streams of different tenants share nothing."""
        return SessionPast(self, layout, root_key(self._fingerprint.digest, tenant))

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory: blocks, and what is searched."""
        with self._lock:
            return self._host.used_bytes + self._index_bytes

    @property
    def used_bytes(self) -> dict[str, int]:
        """Bytes by tier."""
        tiers = [*self._memory, *self._slower]
        return {tier.name: tier.used_bytes for tier in tiers} | {"host": self.host_bytes}

    @property
    def keys_in_use(self) -> dict[str, int]:
        """How many streams use each block."""
        with self._lock:
            return {key: use.streams for key, use in self._uses.items()}

    def prepare(self, block: Block) -> None:
        """Take a block, for one stream: readable at once. Raises StorageFull; then nothing is kept."""
        with self._lock:
            if not (self._host.holds(block.key) or self.holds(block.key)):
                self._make_room(block.nbytes)
                self._host.put(block)
                if self._device is not None and block.nbytes <= self._device.budget_bytes:
                    self._device.evict(self._spare(self._device), block.nbytes)
                    self._device.put(block)
            self.share(block.key, block.index)

    def complete(self, key: str, boundary: dict[str, Tensor]) -> None:
        """A prepared block is whole; it goes to the slower tiers in the background. Raises StorageFull."""
        with self._lock:
            if not self._host.holds(key) or self._host.get(key).boundary:
                return  # another stream completed it
            self._make_room(nbytes(boundary))
            block = replace(self._host.get(key), boundary=boundary)
            self._host.put(block)
            if self._slower:
                self._uses[key].writing = self._writer.submit(self._write_through, block)

    def share(self, key: str, index: dict[str, Tensor]) -> None:
        """One more stream uses a block."""
        with self._lock:
            use = self._uses.setdefault(key, _Use(index_bytes=nbytes(index)))
            use.streams += 1

    def release(self, key: str) -> None:
        """One stream less uses a block. It stays for the next that begins the same way, until its room is needed."""
        with self._lock:
            use = self._uses[key]
            use.streams -= 1
            if use.streams == 0:
                del self._uses[key]
                if not self._config.reuse or (self._host.holds(key) and not self._host.get(key).boundary):
                    self._forget(key, use)

    def rows(self, key: str, rows_n: Tensor) -> Tensor:
        """Rows of a block, from the nearest tier that gives them whole. Raises PastKVError."""
        return self._first(key, lambda tier: tier.rows(key, rows_n).cpu())

    def head(self, key: str) -> BlockHead:
        """Index and boundary of a block, from the nearest tier that gives them whole. Raises PastKVError."""
        return self._first(key, lambda tier: tier.head(key))

    def holds(self, key: str) -> bool:
        """Whether a tier has the block, complete, as far as can be told without reading it."""
        if self._host.holds(key) and self._host.get(key).boundary:
            return True
        return self._held_slower(key)

    def settle(self) -> None:
        """Wait until everything complete is written, or has failed to be."""
        with self._lock:
            writing = self._writes()
        wait(writing)

    def close(self) -> None:
        """Release everything this process holds, on disk too; shared blocks stay."""
        self._writer.shutdown(wait=True)
        for tier in (*self._memory, *self._slower):
            tier.close()

    def check_integrity(self) -> None:
        """Raise AssertionError if the books don't balance."""
        self.settle()
        with self._lock:
            assert all(use.streams > 0 for use in self._uses.values()), "a block without a stream"
            for tier in self._memory:
                assert tier.used_bytes == sum(tier.get(key).nbytes for key in tier.keys), f"{tier.name} bytes"
                assert tier.used_bytes <= tier.budget_bytes, f"{tier.name} is over its budget"
            for key in self._host.keys:
                assert self._host.get(key).boundary or key in self._uses, "an incomplete block that nobody uses"

    @property
    def _index_bytes(self) -> int:
        """What is searched of blocks that are in use and have left host memory otherwise."""
        return sum(use.index_bytes for key, use in self._uses.items() if not self._host.holds(key))

    def _make_room(self, needed_bytes: int) -> None:
        """Room in host memory, by waiting for writes if need be. Raises StorageFull."""
        while (used := self.host_bytes) + needed_bytes > self._config.host_bytes:
            spare = next(self._spare(self._host), None)
            if spare is not None:
                self._host.delete(spare)
                continue
            writing = self._writes()
            if not writing:
                raise StorageFull(
                    f"past KV needs {needed_bytes} more bytes of host memory, and {used} of {self._config.host_bytes}"
                    " are in use; delete sessions, raise host_bytes, or give the disk tier room"
                )
            self._lock.release()
            try:
                wait(writing, return_when="FIRST_COMPLETED")
            finally:
                self._lock.acquire()

    def _writes(self) -> list[Future[None]]:
        return [use.writing for use in self._uses.values() if use.writing is not None and not use.writing.done()]

    def _spare(self, tier: MemoryTier) -> Iterator[str]:
        """What a memory tier may forget, least recently used first: what nobody uses, and what is held elsewhere."""
        for key in tier.keys:
            if tier is self._device or key not in self._uses or self._held_slower(key):
                yield key

    def _held_slower(self, key: str) -> bool:
        return any(self._try(tier, lambda t: t.holds(key), False) for tier in self._slower)

    def _write_through(self, block: Block) -> None:
        for tier in self._slower:
            with self._lock:
                unused = [key for key in tier.keys if key not in self._uses]
            tier.evict(unused, block.nbytes)
            self._try(tier, lambda t: t.put(block), None)

    def _forget(self, key: str, use: _Use) -> None:
        for tier in self._memory:
            tier.delete(key)
        if self._disk is not None:
            disk = self._disk
            if use.writing is not None and not use.writing.done():
                use.writing.add_done_callback(lambda _: disk.delete(key))
            disk.delete(key)

    def _first(self, key: str, read: Callable[[Tier], T]) -> T:
        failure: PastKVError = BlockMissing(f"block {key} isn't held anywhere")
        for tier in (*self._memory, *self._slower):
            if tier in self._memory and not tier.holds(key):
                continue
            try:
                return self._attempt(tier, read)
            except (BlockDamaged, BlockMismatch) as error:
                log.warning("%s tier: %s", tier.name, error.message)
                self._try(tier, lambda t: t.delete(key), None)
                failure = error
            except PastKVError as error:
                failure = error
        raise failure

    def _try(self, tier: Tier, act: Callable[[Tier], T], otherwise: T) -> T:
        try:
            return self._attempt(tier, act)
        except PastKVError:
            return otherwise

    def _attempt(self, tier: Tier, act: Callable[[Tier], T]) -> T:
        """Let a tier act; count what goes wrong, and leave a tier alone that doesn't answer."""
        if time.monotonic() < self._paused_until.get(tier.name, 0):
            raise TierUnavailable(f"the {tier.name} tier didn't answer a moment ago")
        try:
            return act(tier)
        except PastKVError as error:
            self.faults[f"{tier.name}.{type(error).__name__}"] += 1
            if isinstance(error, TierUnavailable):
                log.warning("%s tier: %s", tier.name, error.message)
                self._paused_until[tier.name] = time.monotonic() + PAUSE_S
            raise


def _shared_tier(config: CacheConfig, fingerprint: Fingerprint, blocks: BlockFormat) -> Tier | None:
    if config.shared is None:
        return None
    if config.shared.startswith(("redis://", "rediss://", "unix://")):
        return RedisTier(config.shared, blocks, config.shared_lifetime_s)
    if "://" in config.shared:
        raise ConfigError(f"shared={config.shared!r} must be a folder, or the address of a Redis server (redis://...)")
    return SharedDirectory(Path(config.shared), fingerprint.digest, blocks, config.shared_bytes)
