"""The sessions that this replica works on, claimed in the directory while calls use them.

What is here is a copy. It is good as long as the directory's fencing token and generation are those it was made with;
else it is made again, from the log. So nothing is lost with a replica, and a session that no call uses can be let go
of at any time.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from array import array
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from segcore.engine.engine import Engine
from segcore.errors import Cancelled, LeaseLost, NotFound, SegcoreError, Unavailable
from segcore.weights import LoadedModel
from services.serving.config import ServeConfig
from services.serving.directory.base import Directory, Lease, Name
from services.serving.live import Live, interruption
from services.serving.record import Contents, Entry, Record, contents
from services.serving.residents import Residents

T = TypeVar("T")

_DIRECTORY_THREADS = 16


class Lives:
    """All that are live here; `residents` are in the engine, too."""

    def __init__(self, model: LoadedModel, engine: Engine, directory: Directory, config: ServeConfig) -> None:
        self._config, self.directory = config, directory
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
        self._lives: dict[Name, Live] = {}
        self.residents = Residents(model, engine, config, self._lives, self._contents)
        self._threads = ThreadPoolExecutor(_DIRECTORY_THREADS, thread_name_prefix="segcore-directory")
        self._renewing: asyncio.Task[None] | None = None
        self._draining = False

    async def run(self, call: Callable[..., T], *args: object, **named: object) -> T:
        """A call of the directory, which may take its time."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: call(*args, **named))

    def find(self, name: Name) -> Live | None:
        """The session, if it is live here."""
        return self._lives.get(name)

    @asynccontextmanager
    async def using(self, name: Name) -> AsyncIterator[Live]:
        """A session for one call. Its lease lasts until the last call has ended. Raises Unavailable while draining."""
        if self._draining:
            raise _going_away()
        live = self._lives.setdefault(name, Live(name))
        live.calls += 1
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew())
        try:
            yield live
        finally:
            live.calls -= 1
            live.used = time.monotonic()
            async with live.lock:
                if not live.calls:
                    await self._leave(live)

    @asynccontextmanager
    async def claimed(self, live: Live, *, resident: bool = False) -> AsyncIterator[None]:
        """Alone with a session, whose copy here is good. resident: the engine's, too.

        Raises NotFound, Unavailable while another replica works on it, and as `Residents.take_up`.
        """
        async with live.lock:
            await self._claim(live)
            if resident:
                await self.residents.take_up(live)
            yield

    async def commit(self, live: Live, *entries: Entry, note: bool = True, keep: int | None = None) -> None:
        """Write entries and, with `note`, the record. Whatever fails, the copy here is then no longer trusted."""
        if not live.trusted or live.lease is None:
            raise LeaseLost(f"session {live.name.session_id!r} has changed meanwhile; try again", retry_after_s="0.1")
        live.trusted = False
        after = (live.entries if keep is None else keep) + len(entries)
        tokens = live.tokens + sum(len(entry.tokens) for entry in entries)
        if note:
            live.record.entries, live.record.tokens = after, tokens
        live.generation = await self.run(
            self.directory.commit,
            live.lease,
            live.generation,
            [entry.to_bytes() for entry in entries],
            record=live.record.to_bytes() if note else None,
            keep=keep,
            ttl_s=live.record.ttl_s,
        )
        live.trusted, live.entries, live.tokens = True, after, tokens

    @asynccontextmanager
    async def ending(self, name: Name) -> AsyncIterator[None]:
        """The session is deleted within, which ends what is under way on it."""
        live, why = self._lives.get(name), Cancelled(f"session {name.session_id!r} was deleted")
        if live is not None:
            live.ending = why
        try:
            yield
        except BaseException:
            if live is not None:
                live.ending = None
            raise
        if live is not None:
            live.trusted = False
            live.interrupt(why)
            await self.residents.let_go(live)
            if not live.calls and self._lives.get(name) is live:
                del self._lives[name]

    async def drain(self) -> None:
        """Take no more calls, and end those under way: other replicas go on with them."""
        self._draining = True
        for live in self._lives.values():
            live.interrupt(_going_away())
        while any(live.calls for live in self._lives.values()):  # noqa: ASYNC110 - calls end in many ways
            await asyncio.sleep(0.01)
        if self._renewing is not None:
            self._renewing.cancel()
        self._threads.shutdown(wait=True)

    async def _leave(self, live: Live) -> None:
        """No call uses the session any more; the lock is held."""
        if live.lease is not None:
            with suppress(SegcoreError):  # it ends by itself
                await self.run(self.directory.release, live.lease)
        if not live.resident:
            self._lives.pop(live.name, None)

    async def _claim(self, live: Live) -> None:
        if live.answer is not None:
            return  # it is being written just now
        sent = time.monotonic()
        try:
            lease, stored = await self.run(self.directory.claim, live.name, self.owner, self._config.lease_s)
        except NotFound:
            live.trusted, live.lease = False, None
            await self.residents.let_go(live)
            raise
        live.sure_until = sent + self._config.lease_s
        if live.interrupted.done():
            live.interrupted = interruption()
        if live.trusted and (lease, stored.generation) == (live.lease, live.generation):
            return
        # The lease is given back even if what comes with it can't be read.
        live.trusted, live.ending, live.lease = False, None, lease
        await self.residents.let_go(live)
        record = Record.read(stored.record)
        live.given = array("i")
        if (answer := record.answer) is not None:
            rest = await self.run(lambda: list(self.directory.log(live.name, answer.first_entry)))
            for entry in rest:
                live.given.extend(Entry.read(entry).tokens)
        live.record, live.tokens = record, record.tokens + len(live.given)
        live.generation, live.entries, live.trusted = stored.generation, stored.entries, True

    async def _contents(self, live: Live) -> Contents:
        return await self.run(lambda: contents(live.record, self.directory.log(live.name)))

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._config.lease_s / 3)
            used = [live for live in self._lives.values() if live.calls and live.lease is not None]
            await asyncio.gather(*(self._renew_one(live, live.lease) for live in used))

    async def _renew_one(self, live: Live, lease: Lease | None) -> None:
        sent = time.monotonic()
        try:
            wanted = await self.run(self.directory.renew, lease, self._config.lease_s)
            live.sure_until = sent + self._config.lease_s
            if wanted:
                live.interrupt(Unavailable("another replica continues the session; try again", retry_after_s="0.1"))
        except LeaseLost as error:
            live.interrupt(error)
        except SegcoreError as error:
            if time.monotonic() > live.sure_until:
                live.interrupt(error)


def _going_away() -> Unavailable:
    return Unavailable("the replica is going away; try again", retry_after_s="0.1")
