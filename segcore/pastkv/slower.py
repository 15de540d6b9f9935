"""The tiers below host memory: blocks are written to all of them, and read from the nearest that has them whole.

No lock is held while a tier works.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from segcore.config import CacheConfig
from segcore.errors import BlockDamaged, BlockMismatch, BlockMissing, ConfigError, PastKVError
from segcore.fingerprint import Fingerprint
from segcore.pastkv.base import Block, BlockHead, Tier, nbytes
from segcore.pastkv.directory import LocalDisk, SharedDirectory
from segcore.pastkv.format import BlockFormat
from segcore.pastkv.guard import Guard
from segcore.pastkv.redis import RedisTier
from segcore.rate import Pace, Rate
from segcore.tracing import span

log = logging.getLogger(__name__)
T = TypeVar("T")


class SlowerTiers:
    """Local disk and the shared tier, as configured. Methods may be called from any thread.

    What is in use is told to it, and it remembers which tiers have it. missed: called with the key of a block in use
    that a tier was known to have and hasn't.
    """

    def __init__(
        self,
        config: CacheConfig,
        fingerprint: Fingerprint,
        blocks: BlockFormat,
        guard: Guard,
        missed: Callable[[str], None],
    ) -> None:
        self.disk = None if config.directory is None else LocalDisk(config.directory, blocks, config.disk_bytes)
        shared = _shared_tier(config, fingerprint, blocks)
        self._tiers: list[Tier] = [tier for tier in (self.disk, shared) if tier is not None]
        self._guard, self._missed = guard, missed
        self._pace = Pace(config.restore_bytes_per_s)
        self._rates = {tier.name: Rate() for tier in self._tiers}
        self._head_bytes = 0
        self._held: dict[str, set[str]] = {}  # the tiers that have a block, as far as known, of each in use
        self._lock = threading.Lock()
        self._closing = False

    def __bool__(self) -> bool:
        return bool(self._tiers)

    @property
    def used_bytes(self) -> dict[str, int]:
        """Bytes by tier."""
        return {tier.name: tier.used_bytes for tier in self._tiers}

    def use(self, key: str) -> None:
        """A block is in use from now on."""
        with self._lock:
            self._held.setdefault(key, set())

    def release(self, key: str) -> None:
        """A block is in use no more: the tiers may forget it."""
        with self._lock:
            self._held.pop(key, None)

    def write(self, block: Block) -> bool:
        """Write a block to all tiers; whether all of them have it. Raises nothing."""
        tiers = [tier for tier in self._tiers if not (self._closing and tier is self.disk)]
        written = [self._write_to(tier, block) for tier in tiers]
        return all(written)

    def rows(self, key: str, rows_n: Tensor) -> Tensor:
        """Rows of a block, in the order asked for. Raises PastKVError."""
        return self._nearest(key, lambda tier: tier.rows(key, rows_n))

    def head(self, key: str, *, boundary: bool) -> BlockHead:
        """Index and, where it is asked for, boundary of a block, at the pace that is allowed. Raises PastKVError."""
        return self._nearest(key, lambda tier: self._read_head(tier, key, boundary))

    def holds(self, key: str) -> bool:
        """Whether a tier has the block, as far as can be told without reading it."""
        return self._holder(key) is not None

    def still_holds(self, key: str) -> bool:
        """Whether a tier that had a block in use has it still; one that doesn't answer is believed to."""
        return any(self._tier_still_holds(tier, key) for tier in self._tiers)

    def restore_seconds(self, key: str) -> float | None:
        """How long it takes to read a block's head, 0 if that isn't known; None if no tier has it."""
        tier = self._holder(key)
        return None if tier is None else self._rates[tier.name].seconds(self._head_bytes) or 0.0

    def stop(self) -> None:
        """Write nothing more to the local disk: it is about to be removed."""
        self._closing = True

    def close(self) -> None:
        for tier in self._tiers:
            tier.close()

    def _holder(self, key: str) -> Tier | None:
        """The nearest tier that has a block."""
        return next((t for t in self._tiers if self._guard.attempt_or(False, t, lambda t: t.holds(key))), None)

    def _tier_still_holds(self, tier: Tier, key: str) -> bool:
        with self._lock:
            known = tier.name in self._held.get(key, ())
        if not known:
            return False
        if self._guard.attempt_or(True, tier, lambda t: t.holds(key)):
            return True
        self._lost(tier, key)
        return False

    def _note_held(self, tier: Tier, key: str) -> None:
        with self._lock:
            if key in self._held:
                self._held[key].add(tier.name)

    def _forget(self, tier: Tier, key: str) -> bool:
        """Note that a tier doesn't have a block; whether it was known to."""
        with self._lock:
            known = tier.name in self._held.get(key, ())
            if known:
                self._held[key].discard(tier.name)
        return known

    def _lost(self, tier: Tier, key: str) -> None:
        """A tier doesn't have a block: a fault if it had."""
        if self._forget(tier, key):
            self._missed(key)
            self._guard.count(tier, BlockMissing(f"block {key} left the {tier.name} tier"))

    def _write_to(self, tier: Tier, block: Block) -> bool:
        try:
            self._guard.attempt(tier, lambda t: t.put(block, self._spare(t)))
        except PastKVError:
            return False
        except Exception as error:  # a bug, or memory that ran out: past KV goes on without this copy
            log.exception("block %s couldn't be written to the %s tier", block.key, tier.name)
            self._guard.count(tier, error)
            return False
        self._note_held(tier, block.key)
        return True

    def _spare(self, tier: Tier) -> Iterator[str]:
        """What a tier may forget: what nobody uses, then what a still slower tier holds."""
        with self._lock:
            used = {key: key in self._held for key in tier.keys}
        yield from (key for key, in_use in used.items() if not in_use)
        below = self._tiers[self._tiers.index(tier) + 1 :]
        for key, in_use in used.items():
            if in_use and any(self._tier_still_holds(other, key) for other in below):
                self._forget(tier, key)
                yield key

    def _read_head(self, tier: Tier, key: str, boundary: bool) -> BlockHead:
        """How long it takes is noted."""
        rate, size = self._rates[tier.name], 0
        rate.begin()
        try:
            head = tier.head(key, boundary=boundary)
            size = self._head_bytes = nbytes(head.index) + nbytes(head.boundary)
            self._pace.wait(size)
        finally:
            rate.end(size)
        return head

    def _nearest(self, key: str, read: Callable[[Tier], T]) -> T:
        """Read a block from the nearest tier that gives it whole; damaged ones are deleted."""
        failure: PastKVError = BlockMissing(f"block {key} isn't held anywhere")
        for tier in self._tiers:
            try:
                with span("past KV read", tier=tier.name, block=key):
                    found = self._guard.attempt(tier, read)
            except BlockMissing:
                self._lost(tier, key)
            except (BlockDamaged, BlockMismatch) as error:
                log.warning("%s tier: %s", tier.name, error.message)
                self._guard.attempt_or(None, tier, lambda t: t.delete(key))
                if self._forget(tier, key):
                    self._missed(key)
                failure = error
            except PastKVError as error:
                failure = error
            else:
                self._note_held(tier, key)
                return found
        raise failure


def _shared_tier(config: CacheConfig, fingerprint: Fingerprint, blocks: BlockFormat) -> Tier | None:
    if config.shared is None:
        return None
    if config.shared.startswith(("redis://", "rediss://", "unix://")):
        return RedisTier(config.shared, blocks, config.shared_lifetime_s)
    if "://" in config.shared:
        raise ConfigError(f"shared={config.shared!r} must be a folder, or the address of a Redis server (redis://...)")
    return SharedDirectory(Path(config.shared), fingerprint.digest, blocks, config.shared_bytes)
