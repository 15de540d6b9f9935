"""The sessions that this replica works on: claimed in the directory, and in the engine while they are used.

What is here is a copy. It is good as long as the directory's fencing token and generation are those it was made with;
else it is made again, from the log. So nothing is lost with a replica, and a session that no call uses can be let go
of at any time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
import uuid
from array import array
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any, TypeVar

from segcore.engine.engine import Engine
from segcore.errors import (
    Busy,
    Cancelled,
    FailedPrecondition,
    LeaseLost,
    LimitExceeded,
    NotFound,
    SegcoreError,
    SessionLost,
    Unavailable,
)
from segcore.text import DocumentEncoder
from segcore.tracing import span
from segcore.weights import LoadedModel
from services.serving.answer import Answer
from services.serving.config import ServeConfig
from services.serving.directory.base import Directory, Lease, Name
from services.serving.record import Entry, Record, contents

log = logging.getLogger(__name__)
T = TypeVar("T")

# Sessions that are taken up at once; the engine has others to serve.
_LOADS = 2
_DIRECTORY_THREADS = 16


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
    interrupted: asyncio.Future[SegcoreError] = field(default_factory=lambda: _future())
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


class Lives:
    """All that are live here."""

    def __init__(self, model: LoadedModel, engine: Engine, directory: Directory, config: ServeConfig) -> None:
        self._model, self._engine, self._config = model, engine, config
        self.directory, self.owner = directory, f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
        self._fingerprint = asdict(engine.fingerprint)
        self._lives: dict[Name, Live] = {}
        self._loading: set[Name] = set()
        self._loads = asyncio.Semaphore(_LOADS)
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

        Raises NotFound, Unavailable while another replica works on it, and as `_load` does.
        """
        async with live.lock:
            await self._claim(live)
            if resident:
                await self.reside(live)
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
    async def room(self, name: Name) -> AsyncIterator[None]:
        """Room in the engine for a stream that is no session. Raises Busy."""
        await self._make_room(name)
        try:
            yield
        finally:
            self._loading.discard(name)

    async def let_go(self, live: Live) -> None:
        """Take a session out of the engine, which frees its slot within one step."""
        if live.resident:
            live.resident, live.encoder = False, None
            with suppress(NotFound):
                await _to_its_end(partial(self._engine.close, live.key))

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
            await self.let_go(live)
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
            await self.let_go(live)
            raise
        live.sure_until = sent + self._config.lease_s
        if live.interrupted.done():
            live.interrupted = _future()
        if live.trusted and (lease, stored.generation) == (live.lease, live.generation):
            return
        # The lease is given back even if what comes with it can't be read.
        live.trusted, live.ending, live.lease = False, None, lease
        await self.let_go(live)
        record = Record.read(stored.record)
        live.given = array("i")
        if (answer := record.answer) is not None:
            rest = await self.run(lambda: list(self.directory.log(live.name, answer.first_entry)))
            for entry in rest:
                live.given.extend(Entry.read(entry).tokens)
        live.record, live.tokens = record, record.tokens + len(live.given)
        live.generation, live.entries, live.trusted = stored.generation, stored.entries, True

    async def reside(self, live: Live) -> None:
        """See that the engine has the session; it is claimed. Raises FailedPrecondition, Busy, and as `_load` does."""
        if live.resident and self._engine.session_stats(live.key).failed:
            await self.let_go(live)  # its tokens are whole: it is made again
        if not live.resident:
            self._check_fingerprint(live)
            async with self._loads:
                await self._make_room(live.name)
                try:
                    await self._load(live)
                finally:
                    self._loading.discard(live.name)

    async def _load(self, live: Live) -> None:
        """Make the session in the engine from its log. Raises SessionLost, LimitExceeded, Busy."""
        record = live.record
        found = await self.run(lambda: contents(record, self.directory.log(live.name)))
        if len(found.tokens) > self._engine.max_stream_tokens:
            raise LimitExceeded(f"the session has {len(found.tokens)} tokens, more than this service runs")
        if found.tokens and not 0 <= min(found.tokens) <= max(found.tokens) < self._engine.spec.vocabulary:
            raise SessionLost("the session's log holds tokens that the model doesn't have")
        live.resident, live.digest = True, found.digest
        replay = partial(self._engine.replay, live.key, found.tokens, found.stops, tenant=live.name.tenant)
        try:
            with span("session taken up", tokens=len(found.tokens)):
                await _to_its_end(replay)
        except BaseException:
            await self.let_go(live)
            raise
        document = record.open_document
        if document is not None:
            tokenizer = self._model.tokenizer
            live.encoder = DocumentEncoder.continued(tokenizer, document.committed_offset, found.held)

    def _check_fingerprint(self, live: Live) -> None:
        """Raise FailedPrecondition for a session of another model or configuration, unless it may be recomputed."""
        changed = self._engine.fingerprint.differences(dict(live.record.fingerprint))
        if not changed:
            return
        fields = ", ".join(changed)
        if self._config.changed_sessions == "refuse" or "tokenizer" in changed:
            raise FailedPrecondition(
                f"session {live.name.session_id!r} was begun with another {fields}; begin a new one, or serve what it"
                " was begun with",
                fields=",".join(changed),
            )
        if live.record.answer is not None:
            raise FailedPrecondition(
                f"session {live.name.session_id!r} was answering with another {fields}; cancel the answer",
                fields=fields,
            )
        log.info("session recomputed: it was begun with another %s", fields)
        live.record.fingerprint = dict(self._fingerprint)

    async def _make_room(self, name: Name) -> None:
        """Let go of sessions that no call uses until one more fits. Raises Busy."""
        while len(self._loading | {live.name for live in self._lives.values() if live.resident}) >= (
            self._config.max_sessions
        ):
            spare = [live for live in self._lives.values() if live.resident and not live.calls]
            if not spare:
                raise Busy(
                    f"all {self._config.max_sessions} sessions that fit are at work; try again", retry_after_s="0.5"
                )
            stats = self._engine.session_stats
            victim = min(spare, key=lambda live: (stats(live.key).pending_tokens > 0, live.used))
            async with victim.lock:
                if not victim.calls:
                    await self.let_go(victim)
            if not victim.calls:
                self._lives.pop(victim.name, None)
        self._loading.add(name)

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


async def _to_its_end(call: Callable[[], object]) -> None:
    """In a thread. A caller who is cancelled waits all the same, for the thread goes on."""
    work = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


def _future() -> asyncio.Future[SegcoreError]:
    return asyncio.get_running_loop().create_future()
