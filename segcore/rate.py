"""How quick something is of late, and how quick it may be."""

from __future__ import annotations

import threading
import time

# What an earlier measurement weighs beside the next one.
FADING = 0.8
# A rate that nobody has measured for so long isn't known any more: it is worth another try.
FORGOTTEN_S = 60.0


class Rate:
    """Units a second, from what was done and how long it took; older measurements fade.

    What is done at the same time counts together: `begin` and `end` may be called from any thread.
    """

    def __init__(self) -> None:
        self._units = self._seconds = 0.0
        self._at = float("-inf")
        self._under_way, self._since = 0, 0.0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Something begins that `end` will tell the units of."""
        with self._lock:
            if not self._under_way:
                self._since = time.monotonic()
            self._under_way += 1

    def end(self, units: float) -> None:
        """Something that had begun is done, or, without units, has failed."""
        with self._lock:
            now = time.monotonic()
            self.add(units, now - self._since)
            self._since = now
            self._under_way -= 1

    def add(self, units: float, seconds: float) -> None:
        self._units = FADING * self._units + units
        self._seconds = FADING * self._seconds + seconds
        self._at = time.monotonic()

    def seconds(self, units: float) -> float | None:
        """How long so many units take; None if that isn't known."""
        known = self._units > 0 and time.monotonic() - self._at < FORGOTTEN_S
        return units * self._seconds / self._units if known else None


class Pace:
    """Lets at most so many units a second pass; None: any number. Methods may be called from any thread."""

    def __init__(self, units_per_s: float | None) -> None:
        self._units_per_s, self._free_at = units_per_s, 0.0
        self._lock = threading.Lock()

    def wait(self, units: float) -> None:
        """Return once units that passed before are paid for."""
        if self._units_per_s is None:
            return
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._free_at)
            self._free_at = begin + units / self._units_per_s
        time.sleep(begin - now)
