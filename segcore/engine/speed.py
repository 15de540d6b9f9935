"""How long passes take. A GPU is never waited for: it notes when a pass began and ended, and is asked later."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from segcore.rate import Rate


class Speed:
    """Tokens a second of prefill. Used by the engine's thread; `seconds` by any."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._rate = device.type == "cuda", Rate()
        self._running: deque[tuple[int, Any, Any]] = deque()

    @contextmanager
    def measured(self, tokens: int) -> Iterator[None]:
        """Measure a pass over so many tokens."""
        if not self._on_gpu:
            began = time.perf_counter()
            yield
            self._rate.add(tokens, time.perf_counter() - began)
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._running.append((tokens, first, last))
        while self._running and self._running[0][2].query():
            count, first, last = self._running.popleft()
            self._rate.add(count, first.elapsed_time(last) / 1000)

    def seconds(self, tokens: int) -> float | None:
        """How long so many tokens take; None if that isn't known."""
        return self._rate.seconds(tokens)
