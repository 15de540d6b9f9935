"""Requests as they come: in their time, and decoded.

Those that can't be decoded gRPC would call a fault of the service's; they are the caller's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from segcore.errors import Busy, DeadlineExceeded, InvalidRequest, Unavailable


class Undecodable:
    """Stands for a request whose bytes are no message of its kind."""


class Decoding(grpc.aio.ServerInterceptor):
    """Hands requests that can't be decoded on as `Undecodable`, to the servicers of some services."""

    def __init__(self, services: Collection[str]) -> None:
        self._services = services

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.split("/")[1] not in self._services:
            return handler
        return handler._replace(request_deserializer=_or_undecodable(handler.request_deserializer))


def _or_undecodable(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decoded(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError:
            return Undecodable()

    return decoded


def check_decoded(request: Any) -> None:
    """Raise InvalidRequest for one that couldn't be decoded."""
    if isinstance(request, Undecodable):
        raise InvalidRequest("the request's bytes aren't a message of its kind", field="message")


async def all_decoded(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """A stream's requests. Raises InvalidRequest at the first that couldn't be decoded."""
    async for request in requests:
        check_decoded(request)
        yield request


class Time:
    """The time that a call says it has. ends: by the monotonic clock; None: no limit.

    details: how far it has come, for errors after which it can be continued.
    """

    def __init__(self) -> None:
        self.ends: float | None = None
        self.details: dict[str, object] = {}

    def begin(self, seconds: float | None) -> None:
        self._seconds, self.ends = seconds, None if seconds is None else time.monotonic() + seconds

    async def holds(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """A stream's requests. Raises DeadlineExceeded once the time is up, whether more come or not."""
        coming = aiter(requests)
        while True:
            left = None if self.ends is None else self.ends - time.monotonic()
            if left is not None and left <= 0:
                raise self._over()
            try:
                async with asyncio.timeout(left):
                    request = await anext(coming, None)
            except TimeoutError:
                raise self._over() from None
            if request is None:
                return
            yield request

    @contextmanager
    def told(self) -> Iterator[None]:
        """Add the details to such errors."""
        try:
            yield
        except (Busy, DeadlineExceeded, Unavailable) as error:
            error.details = {name: str(value) for name, value in self.details.items()} | error.details
            raise

    def _over(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the time of {self._seconds} s is up; the call can be continued", **self.details)
