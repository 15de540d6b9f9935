"""What a failed call stands for, and when it is made again."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from segcore.errors import DeadlineExceeded, SegcoreError, Unavailable
from services.serving.status import error_of

T = TypeVar("T")

_RETRY_SECONDS = (0.1, 0.3, 1.0, 3.0, 6.0)
# As long as a service asks for, at most: what a tenant has used beyond its limit takes its time to be made up for.
_LONGEST_SECONDS = 300.0
_WORD_SECONDS = 1.0


class Deadline:
    """When a call's time is up, over all its tries; without `timeout_s` never."""

    def __init__(self, timeout_s: float | None = None) -> None:
        self.timeout_s, self._ends = timeout_s, math.inf if timeout_s is None else time.monotonic() + timeout_s

    @property
    def left_s(self) -> float | None:
        """What the service is told."""
        return None if self.timeout_s is None else max(self._ends - time.monotonic(), 0.0)

    @property
    def wait_s(self) -> float | None:
        """How long the service's own word is waited for: then it is out of reach."""
        left = self.left_s
        return None if left is None else left + _WORD_SECONDS

    def over(self, **details: object) -> DeadlineExceeded:
        """What is raised if the service doesn't say it."""
        return DeadlineExceeded(f"the time of {self.timeout_s} s is up; what was done stays done", **details)


class Patience:
    """Pauses between tries, as the service asks for, or ever longer; none goes beyond the deadline."""

    def __init__(self, deadline: Deadline | None = None) -> None:
        self._pauses, self._deadline = iter(_RETRY_SECONDS), deadline or Deadline()

    async def wait(self, error: SegcoreError) -> None:
        """Pause before the next try; raises the error if there is to be none."""
        asked = error.details.get("retry_after_s")
        pause = next(self._pauses, None) if isinstance(error, Unavailable) or asked is not None else None
        if pause is None:
            raise error
        pause = pause if asked is None else min(max(float(asked), pause), _LONGEST_SECONDS)
        left = self._deadline.left_s
        if left is not None and left <= pause:
            await asyncio.sleep(left)
            raise self._deadline.over(**error.details) from error
        await asyncio.sleep(pause)


async def retried(call: Callable[[], Awaitable[T]]) -> T:
    """The result of a call that may be made several times. Raises SegcoreError."""
    patience = Patience()
    while True:
        try:
            with typed_errors():
                return await call()
        except SegcoreError as error:
            await patience.wait(error)


async def ended_early(call: Any) -> SegcoreError:
    """Why a call ended without the message that was due."""
    code = await call.code()
    if code is grpc.StatusCode.OK:
        return Unavailable("the service ended the upload before its finish")
    return error_of(
        grpc.aio.AioRpcError(code, await call.initial_metadata(), await call.trailing_metadata(), await call.details())
    )


@contextmanager
def typed_errors() -> Iterator[None]:
    """Turn gRPC's errors into segcore's."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_of(error) from None
