"""One session that this replica works on: a copy of what the directory has, and what is under way."""

from __future__ import annotations

import asyncio
from array import array
from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from segcore.errors import SegcoreError
from segcore.text import DocumentEncoder
from services.serving.answer import Answer
from services.serving.directory.base import Lease, Name
from services.serving.record import Record


@dataclass(eq=False)
class Live:
    """One session here. lock: one writer at a time. calls: how many are under way; used: when the last one ended.

    lease, generation, entries, record, tokens: as the directory has them, if `trusted`. tokens: the stream's length.
    given: tokens of the open answer. resident: the engine has the session, too; encoder, digest: then, of the open
    document. answer: that which is made just now. interrupted: done when long work must end.
    sure_until: when the lease may be over, by this machine's clock. ending: why, if it is being deleted.
    """

    name: Name
    record: Record = field(default_factory=lambda: Record(model="", fingerprint={}, create_time=0, ttl_s=None))
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    interrupted: asyncio.Future[SegcoreError] = field(default_factory=lambda: interruption())
    calls: int = 0
    used: float = 0.0
    trusted: bool = False
    lease: Lease | None = None
    generation: int = 0
    entries: int = 0
    tokens: int = 0
    given: array[int] = field(default_factory=lambda: array("i"))
    resident: bool = False
    encoder: DocumentEncoder | None = None
    digest: Any = field(default_factory=sha256)
    answer: Answer | None = None
    sure_until: float = 0.0
    ending: SegcoreError | None = None

    @property
    def key(self) -> str:
        """Its name in the engine."""
        return f"{self.name.tenant}/{self.name.session_id}"

    def interrupt(self, error: SegcoreError) -> None:
        """End what is under way, as soon as may be."""
        if not self.interrupted.done():
            self.interrupted.set_result(error)

    async def done(self, work: Future[None], seconds: float) -> None:
        """Wait for the engine. Raises TimeoutError, and what interrupts."""
        waiting: asyncio.Future[Any] = asyncio.wrap_future(work)
        either: set[asyncio.Future[Any]] = {waiting, self.interrupted}
        try:
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()  # type: ignore[no-any-return]
        finally:
            waiting.cancel()
        if self.interrupted.done():
            raise self.interrupted.result()
        raise TimeoutError


def interruption() -> asyncio.Future[SegcoreError]:
    """For `Live.interrupted`."""
    return asyncio.get_running_loop().create_future()
