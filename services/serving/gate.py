"""What stands between callers and engines, whichever protocol they speak."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve import context as serve_context
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from segcore.errors import Busy, Cancelled, SegcoreError, Unavailable
from segcore.sampling import SamplingParams
from services.serving.config import ServeConfig
from services.serving.logs import log_fields
from services.serving.messages import AnswerPart, Prompt, ServerInfo, UploadAck, check_name
from services.serving.metrics import METER
from services.serving.status import code_of
from services.serving.tenants import OPEN, Quotas, Tenant, Tenants
from services.serving.tracing import span

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_RETRY_SECONDS = (0.1, 0.3, 1.0, 3.0, 6.0)


@dataclass
class Call:
    """One call. error: what ended it."""

    tenant: Tenant = OPEN
    request_id: str = ""
    error: SegcoreError | None = None


class Gate:
    """Admits callers, and finds the engine of a session. Stateless but for what tenants have used of their limits."""

    def __init__(self, engine: DeploymentHandle, config: ServeConfig) -> None:
        """Raises ConfigError for a tenants' file that can't be used."""
        # Answers come over gRPC, not through the object store: a fraction of the time for each part.
        self._engine, self.config = engine.options(_by_reference=False), config
        self._tenants, self._quotas = Tenants(config.tenants), Quotas(config.fronts)

    def admit(self, authorization: str | None) -> Tenant:
        """Who calls, if the token is known and its tenant may make one more call. Raises Unauthenticated, Busy."""
        tenant = self._tenants.authenticate(authorization)
        self._quotas.take(tenant, "requests")
        return tenant

    @contextmanager
    def call(self, face: str, method: str, headers: Mapping[str, str], session_id: str = "") -> Iterator[Call]:
        """Around one call: it is admitted, measured, traced and logged. Raises as `admit` does.

        Whatever ends the call goes through; `Call.error` is what the client is told of it.
        """
        call, began = Call(), time.monotonic()
        request_id = headers.get("x-request-id") or headers.get("request_id") or ""
        call.request_id = request_id if _REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex
        serve_context._set_request_context(request_id=call.request_id)  # replicas' logs have it, too
        fields = {"request_id": call.request_id, "session_id": headers.get("session_id") or session_id}
        with log_fields(**fields), span(f"{face} {method}", headers, **fields):
            try:
                call.tenant = self.admit(headers.get("authorization"))
                yield call
            except Exception as error:
                call.error = known_error(error)
                raise
            except BaseException:
                call.error = Cancelled("the caller left")
                raise
            finally:
                self._ended(call, face, method, time.monotonic() - began)

    def _ended(self, call: Call, face: str, method: str, seconds: float) -> None:
        code = "OK" if call.error is None else code_of(call.error).name
        METER.count("segcore_requests", face=face, method=method, code=code)
        METER.observe("segcore_request_seconds", seconds, face=face, method=method)
        if call.error is not None and "fields" in call.error.details:
            METER.count("segcore_fingerprint_refusals")
        told = {"face": face, "method": method, "code": code, "seconds": round(seconds, 4), "tenant": call.tenant.name}
        log.info("call", extra={"fields": told})

    async def info(self) -> ServerInfo:
        info: ServerInfo = await self._engine.info.remote()
        return info

    def engine(self, session_id: str) -> DeploymentHandle:
        """The engine that a session is routed to. Raises InvalidRequest for what can't be a session's name."""
        check_name("session_id", session_id)
        return self._engine.options(session_id=session_id)

    async def append(self, tenant: Tenant, session_id: str, document_id: str, offset: int, data: bytes) -> UploadAck:
        """Bytes of a document, within the tenant's limit. Raises Busy, and what the engine's `append` raises."""
        self._quotas.take(tenant, "bytes", len(data))
        METER.count("segcore_uploaded_bytes", len(data))
        ack: UploadAck = await self.engine(session_id).append.remote(tenant.name, session_id, document_id, offset, data)
        return ack

    async def check_sessions(self, tenant: Tenant) -> None:
        """Raise Busy if the tenant has as many sessions as it may."""
        if tenant.sessions is not None:
            count = await self._engine.count.remote(tenant.name, tenant.sessions)
            if count >= tenant.sessions:
                raise Busy(f"all {tenant.sessions} sessions are in use; delete one")

    async def answer(
        self, tenant: Tenant, session_id: str, question: str, params: SamplingParams
    ) -> AsyncGenerator[AnswerPart]:
        """A session's answer, within the tenant's limit; if a replica goes away, another one goes on with it.

        Closing the iterator ends the answer.
        """
        self._quotas.take(tenant, "tokens", 0)
        engine, request_id, finished = self.engine(session_id), uuid.uuid4().hex, False
        asked = (tenant.name, session_id, question, params)

        def begin(after: int) -> Any:
            return engine.options(stream=True).generate.remote(*asked, request_id=request_id, after=after)

        try:
            async with aclosing(_parts(begin)) as parts:
                async for part in parts:
                    self._quotas.charge(tenant, "tokens", part.answer_tokens)
                    finished = part.finish_reason is not None
                    yield part
        finally:
            if not finished:
                with suppress(Exception):
                    await engine.cancel_answer.remote(tenant.name, session_id)

    async def complete(self, tenant: Tenant, prompt: Prompt, params: SamplingParams) -> AsyncGenerator[AnswerPart]:
        """The answer to a prompt that stands for itself, as `answer`."""
        self._quotas.take(tenant, "tokens", 0)

        def begin(after: int) -> Any:
            engine = self._engine.options(session_id=uuid.uuid4().hex, stream=True)
            return engine.complete.remote(tenant.name, prompt, params, after)

        async with aclosing(_parts(begin)) as parts:
            async for part in parts:
                self._quotas.charge(tenant, "tokens", part.prompt_tokens + part.answer_tokens)
                yield part


async def _parts(begin: Callable[[int], Any]) -> AsyncGenerator[AnswerPart]:
    """An answer's parts, taken up again where a replica left it.

    begin: asks for what comes after so many tokens. Raises Unavailable when nothing has come for some attempts.
    """
    after, waits, finished = 0, iter(_RETRY_SECONDS), False
    while not finished:
        response = begin(after)
        try:
            async for part in response:
                yield part
                after, waits = part.token_index, iter(_RETRY_SECONDS)
                finished = part.finish_reason is not None
        except Exception as error:
            wait = next(waits, None) if isinstance(known_error(error), Unavailable) else None
            if wait is None or finished:
                raise
            await asyncio.sleep(wait)
        finally:
            response.cancel()  # ends the answer if the caller went away; no effect once it has ended


def known_error(error: Exception) -> SegcoreError:
    """What a client is told of an error: ours as they are, of others nothing but that there was one."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, SegcoreError):
        return cause
    if isinstance(cause, (RayError, RayServeException)):
        log.warning("engine unreachable: %s", cause)
        return Unavailable("the replica that holds the session isn't reachable; try again")
    log.exception("request failed", exc_info=error)
    return SegcoreError("an internal error; the service's log has it")
