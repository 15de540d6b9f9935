"""What a failed call stands for, and when it is made again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from segcore.errors import SegcoreError, Unavailable
from services.serving.status import error_of

T = TypeVar("T")

_RETRY_SECONDS = (0.1, 0.3, 1.0, 3.0, 6.0)


class Patience:
    """Pauses between tries, as the service asks for, or ever longer."""

    def __init__(self) -> None:
        self._pauses = iter(_RETRY_SECONDS)

    async def wait(self, error: SegcoreError) -> None:
        """Pause before the next try; raises the error if there is to be none."""
        asked = error.details.get("retry_after_s")
        pause = next(self._pauses, None) if isinstance(error, Unavailable) or asked is not None else None
        if pause is None:
            raise error
        await asyncio.sleep(pause if asked is None else min(max(float(asked), pause), _RETRY_SECONDS[-1]))


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
