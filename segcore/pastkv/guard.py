"""Lets tiers act: counts what goes wrong, and leaves a tier alone for a while that doesn't answer."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from segcore.errors import BlockMissing, PastKVError, TierUnavailable
from segcore.pastkv.base import Tier

log = logging.getLogger(__name__)
T = TypeVar("T")

# A tier that failed to answer is left alone for so long, so that a dead server costs one time-out, not one a block.
PAUSE_S = 5.0


class Guard:
    """Faults by tier and kind, and pauses. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._faults: Counter[str] = Counter()
        self._paused_until: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def faults(self) -> Counter[str]:
        """How often what went wrong, as "tier.kind"."""
        with self._lock:
            return self._faults.copy()

    def attempt(self, tier: Tier, act: Callable[[Tier], T]) -> T:
        """Let a tier act. Raises PastKVError.

        That a tier doesn't have a block is no fault by itself: `count` it if the block should be there.
        """
        if time.monotonic() < self._paused_until.get(tier.name, 0):
            raise TierUnavailable(f"the {tier.name} tier didn't answer a moment ago")
        try:
            return act(tier)
        except BlockMissing:
            raise
        except PastKVError as error:
            self.count(tier, error)
            if isinstance(error, TierUnavailable):
                log.warning("%s tier: %s", tier.name, error.message)
                self._paused_until[tier.name] = time.monotonic() + PAUSE_S
            raise

    def attempt_or(self, otherwise: T, tier: Tier, act: Callable[[Tier], T]) -> T:
        """What a tier says, or `otherwise` if it fails."""
        try:
            return self.attempt(tier, act)
        except PastKVError:
            return otherwise

    def count(self, tier: Tier, error: Exception) -> None:
        with self._lock:
            self._faults[f"{tier.name}.{type(error).__name__}"] += 1
