"""The sessions that the engine has: taken up from their logs, let go of when room is wanted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import partial

from segcore.engine.engine import Engine
from segcore.errors import Busy, FailedPrecondition, LimitExceeded, NotFound, SessionLost
from segcore.text import DocumentEncoder
from segcore.tracing import span
from segcore.weights import LoadedModel
from services.serving.config import ServeConfig
from services.serving.directory.base import Name
from services.serving.live import Live
from services.serving.record import Contents

log = logging.getLogger(__name__)

# Sessions that are taken up at once; the engine has others to serve.
_LOADS = 2


class Residents:
    """At most `max_sessions` of those that are live here, and of streams that are no session.

    lives: all that are live here; those that room is made of leave it. contents: reads a session's log.
    """

    def __init__(
        self,
        model: LoadedModel,
        engine: Engine,
        config: ServeConfig,
        lives: dict[Name, Live],
        contents: Callable[[Live], Awaitable[Contents]],
    ) -> None:
        self._model, self._engine, self._config = model, engine, config
        self._lives, self._contents = lives, contents
        self._fingerprint = asdict(engine.fingerprint)
        self._coming: set[Name] = set()
        self._loads = asyncio.Semaphore(_LOADS)

    async def take_up(self, live: Live) -> None:
        """See that the engine has a session, which is claimed.

        Raises FailedPrecondition, Busy, SessionLost, LimitExceeded.
        """
        if live.resident and self._engine.session_stats(live.key).failed:
            await self.let_go(live)  # its tokens are whole: it is made again
        if not live.resident:
            self._check_fingerprint(live)
            async with self._loads, self.room(live.name):
                await self._load(live)

    async def let_go(self, live: Live) -> None:
        """Take a session out of the engine, which frees its slot within one step."""
        if live.resident:
            live.resident, live.encoder = False, None
            with suppress(NotFound):
                await _to_its_end(partial(self._engine.close, live.key))

    @asynccontextmanager
    async def room(self, name: Name) -> AsyncIterator[None]:
        """Room in the engine for one more. Raises Busy."""
        await self._make_room()
        self._coming.add(name)
        try:
            yield
        finally:
            self._coming.discard(name)

    async def _make_room(self) -> None:
        """Let go of sessions that no call uses until one more fits. Raises Busy."""
        most, stats = self._config.max_sessions, self._engine.session_stats
        while len(self._coming | {live.name for live in self._lives.values() if live.resident}) >= most:
            spare = [live for live in self._lives.values() if live.resident and not live.calls]
            if not spare:
                raise Busy(f"all {most} sessions that fit are at work; try again", retry_after_s="0.5")
            victim = min(spare, key=lambda live: (stats(live.key).pending_tokens > 0, live.used))
            async with victim.lock:
                if not victim.calls:
                    await self.let_go(victim)
            if not victim.calls:
                self._lives.pop(victim.name, None)

    async def _load(self, live: Live) -> None:
        """Make the session in the engine from its log."""
        found = await self._contents(live)
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
        document = live.record.open_document
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


async def _to_its_end(call: Callable[[], object]) -> None:
    """In a thread. A caller who is cancelled waits all the same, for the thread goes on."""
    work = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
