"""The engine tier, as those in front of it see it: any session's calls, which survive the replicas that carry them out.

A call is routed to the replica that most likely has the session in memory. If that one goes, or sends the session
elsewhere, the call is made again: each can be, without being carried out twice. If it says nothing at all, its node may
be cut off, which Ray takes a minute to notice: then another replica is asked, and the lease keeps the two apart.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from segcore.errors import Busy, DeadlineExceeded, SegcoreError, Unavailable, WrongOffset
from segcore.sampling import SamplingParams
from services.serving.config import ServeConfig
from services.serving.messages import AnswerPart, Prompt, ServerInfo, UploadAck, check_name

log = logging.getLogger(__name__)
T = TypeVar("T")
Told = Callable[[int], None]

# Those whose results are kept by a request_id; the others can be repeated as they are, unless they expect a generation.
_BY_REQUEST = ("create", "delete", "fork", "rewind", "import_session")
# Those whose work may be long: they are told what is left of the caller's time.
_TIMED = ("finish",)
_LONGEST_WAIT_S = 1.0
# How long a call is tried on after its first failure, beside the time that a lost replica's lease lasts.
_PATIENCE_S = 15.0
# How long a replica may say nothing, beside the slice that it works for, before it is asked whether it is there; and
# how long it may take to say so.
_SILENCE_S = 10.0
_ANSWERS_S = 5.0
# How long it is tried to end an answer that failed.
_END_S = 2.0
_PLACES = 8


class Engines:
    """Calls of `Sessions`, by name, and its streams; they raise SegcoreError."""

    def __init__(self, handle: DeploymentHandle, config: ServeConfig) -> None:
        self._handle, self._config = handle, config
        self._patience_s = 2 * config.lease_s + _PATIENCE_S
        self._silence_s = config.slice_s + _SILENCE_S

    async def call(
        self, method: str, tenant: str, session_id: str = "", *args: Any, ends: float | None = None, **options: Any
    ) -> Any:
        """One call, once a replica has answered it. ends: when the caller's time is up, by the monotonic clock."""
        once = method in _BY_REQUEST or options.get("expected_generation") is not None
        if once and not options.get("request_id"):
            options["request_id"] = uuid.uuid4().hex
        patience, way = self._patience(ends), self._way(session_id)
        who = (tenant, session_id) if session_id else (tenant,)
        while True:
            if ends is not None and method in _TIMED:
                options["timeout_s"] = _left(ends)
            try:
                return await way.answered(getattr(way.at, method).remote(*who, *args, **options))
            except Exception as error:
                await patience.wait(await way.known(error))

    async def info(self) -> ServerInfo:
        """What the service runs and accepts. Raises Unavailable if no engine says so."""
        way = self._way(uuid.uuid4().hex)
        for silence in (_ANSWERS_S, self._silence_s):
            try:
                async with asyncio.timeout(silence):
                    made: ServerInfo = await way.at.info.remote()
                    return made
            except Exception as error:
                known = await way.known(error)
                if not isinstance(error, TimeoutError):
                    raise known from None
        raise known

    async def append(
        self,
        tenant: str,
        session_id: str,
        document_id: str,
        offset: int,
        data: bytes,
        ends: float | None = None,
        told: Told = lambda _: None,
    ) -> UploadAck:
        """`Sessions.append`, until there is room. ends: as of `call`. told: is given the counts of tokens taken."""
        patience, way, tried, stop = self._patience(ends), self._way(session_id), False, str(offset + len(data))
        while True:
            try:
                where = (tenant, session_id, document_id, offset, data)
                ack: UploadAck = await way.answered(way.at.append.remote(*where, timeout_s=_left(ends)))
            except Exception as error:
                known = await way.known(error)
                taken = isinstance(known, WrongOffset) and known.details.get("committed_offset") == stop
                if not (tried and taken):  # else only the answer to the earlier try was lost
                    await patience.wait(known)
                    tried = True
                    continue
            else:
                told(ack.input_tokens)
                if not ack.waiting:
                    return ack
            offset, data = int(stop), b""

    async def finish(
        self,
        tenant: str,
        session_id: str,
        document_id: str,
        total_bytes: int,
        sha256: bytes,
        ends: float | None = None,
        told: Told = lambda _: None,
    ) -> UploadAck:
        """`Sessions.finish`, until all has been run. told: as of `append`."""
        while True:
            where = (tenant, session_id, document_id, total_bytes, sha256)
            ack: UploadAck = await self.call("finish", *where, ends=ends)
            told(ack.input_tokens)
            if ack.finished:
                return ack

    async def export(self, tenant: str, session_id: str) -> AsyncIterator[bytes]:
        """`Sessions.export`; a broken one isn't taken up."""
        try:
            async for data in self._way(session_id).at.options(stream=True).export.remote(tenant, session_id):
                yield data
        except Exception as error:
            raise as_segcore_error(error) from None

    async def generate(
        self,
        tenant: str,
        session_id: str,
        question: str,
        params: SamplingParams,
        *,
        request_id: str = "",
        after: int = 0,
        timeout_s: float | None = None,
        expected_generation: int | None = None,
    ) -> AsyncGenerator[AnswerPart]:
        """`Sessions.generate`, over as many replicas and slices as it takes.

        Without a request_id the answer ends when the iterator is closed.
        """
        named, ends = bool(request_id), None if timeout_s is None else time.monotonic() + timeout_s
        request_id, finished = request_id or uuid.uuid4().hex, False

        def begin(at: DeploymentHandle, after: int) -> Any:
            options: dict[str, Any] = {"request_id": request_id, "after": after, "slice_s": self._config.slice_s}
            options |= {"timeout_s": _left(ends), "expected_generation": expected_generation}
            return at.options(stream=True).generate.remote(tenant, session_id, question, params, **options)

        try:
            async with aclosing(self._taken_up(self._way(session_id), begin, after, ends)) as parts:
                async for part in parts:
                    finished = part.finish_reason is not None
                    yield part
        except SegcoreError as error:
            finished = True  # as far as it can be
            if not named and isinstance(error, (Busy, DeadlineExceeded, Unavailable)):  # nobody can take it up
                soon = time.monotonic() + _END_S
                with suppress(SegcoreError):
                    await self.call("cancel_answer", tenant, session_id, request_id=request_id, ends=soon)
            raise
        finally:
            if not (named or finished):
                await self.call("cancel_answer", tenant, session_id, request_id=request_id)

    async def complete(self, tenant: str, prompt: Prompt, params: SamplingParams) -> AsyncGenerator[AnswerPart]:
        """`Completions.complete`, over as many replicas as it takes: another one says the same from the beginning."""

        def begin(at: DeploymentHandle, after: int) -> Any:
            return at.options(stream=True).complete.remote(tenant, prompt, params, after)

        async with aclosing(self._taken_up(self._way(uuid.uuid4().hex), begin, 0)) as parts:
            async for part in parts:
                yield part

    async def _taken_up(
        self, way: _Way, begin: Callable[[DeploymentHandle, int], Any], after: int, ends: float | None = None
    ) -> AsyncGenerator[AnswerPart]:
        """An answer's parts, taken up where a replica leaves it. begin: asks one for those after so many tokens."""
        patience, finished = self._patience(ends), False
        while not finished:
            try:
                async with aclosing(_stream(way, begin(way.at, after))) as parts:
                    async for part in parts:
                        finished = part.finish_reason is not None
                        if part.token_index > after:
                            patience, after = self._patience(ends), part.token_index
                        yield part
            except (SegcoreError, TimeoutError, RayError, RayServeException) as error:
                await patience.wait(await way.known(error))

    def _patience(self, ends: float | None = None) -> _Patience:
        return _Patience(self._patience_s, ends)

    def _way(self, session_id: str) -> _Way:
        if session_id:
            check_name("session_id", session_id)
        return _Way(self._handle, session_id, self._silence_s)


async def _stream(way: _Way, parts: Any) -> AsyncGenerator[AnswerPart]:
    """A replica's parts. Raises TimeoutError if it is silent, and what it raises."""
    coming = aiter(parts)
    try:
        while (part := await way.answered(anext(coming, None))) is not None:
            yield part
    finally:
        parts.cancel()  # has no effect once it has ended


class _Way:
    """To the replica of a session, or any if there is none; around it once it has said nothing for too long.

    at: where the next call goes.
    """

    def __init__(self, handle: DeploymentHandle, session_id: str, silence_s: float) -> None:
        self._handle, self._session_id, self._silence_s = handle, session_id, silence_s
        self.at = handle.options(session_id=session_id) if session_id else handle

    async def answered(self, call: Awaitable[T]) -> T:
        """What a replica answers, however long its work takes while it is there. Raises TimeoutError if it isn't."""
        waiting = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({waiting}, timeout=self._silence_s))[0]:
                async with asyncio.timeout(_ANSWERS_S):
                    await self.at.info.remote()
            return waiting.result()
        finally:
            waiting.cancel()

    async def known(self, error: Exception) -> SegcoreError:
        """A call's failure, as clients may know it; the next call goes elsewhere if it had no answer."""
        if not isinstance(error, TimeoutError):
            return as_segcore_error(error)
        log.warning("an engine says nothing; others are asked")
        for place in range(_PLACES):  # of the ring, where each replica has many
            self.at = self._handle.options(session_id=f"{self._session_id}/{place}")
            with suppress(TimeoutError, RayError, RayServeException):
                async with asyncio.timeout(_ANSWERS_S):
                    await self.at.info.remote()
                    break
        return Unavailable("the replica that works on the session says nothing; try again")


class _Patience:
    """How long unreachable replicas are waited for, by ever longer pauses or as they ask for.

    From the first failure on: until a silent replica is known to be gone, more time than that may have passed. over:
    when the caller's time is up, beyond which none is waited for.
    """

    def __init__(self, seconds: float, over: float | None) -> None:
        self._seconds, self._ends, self._pause = seconds, math.inf, 0.05
        self._over = math.inf if over is None else over

    async def wait(self, error: SegcoreError) -> None:
        """Pause before the next try; raises the error if there is to be none."""
        now = time.monotonic()
        self._ends = min(self._ends, now + self._seconds)
        if not isinstance(error, Unavailable) or now > self._ends:
            raise error
        pause = min(float(error.details.get("retry_after_s", self._pause)), _LONGEST_WAIT_S)
        self._pause = min(2 * self._pause, _LONGEST_WAIT_S)
        if now + pause >= self._over:
            raise DeadlineExceeded("the call's time is up, and no engine was there; continue it", **error.details)
        await asyncio.sleep(pause)


def _left(ends: float | None) -> float | None:
    return None if ends is None else max(ends - time.monotonic(), 0.0)


def as_segcore_error(error: Exception) -> SegcoreError:
    """What went wrong, as clients may know it."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, SegcoreError):
        return cause
    if isinstance(cause, (RayError, RayServeException)):
        log.warning("engine unreachable: %s", cause)
        return Unavailable("the replica that works on the session isn't reachable; try again")
    log.exception("request failed", exc_info=error)
    return SegcoreError("an internal error; the service's log has it")
