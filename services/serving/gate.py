"""What stands between callers and engines, whichever protocol they speak."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ray.serve import context as serve_context
from ray.serve.handle import DeploymentHandle

from segcore.errors import Busy, Cancelled, NotFound, SegcoreError
from segcore.sampling import SamplingParams
from services.serving.config import ServeConfig
from services.serving.engines import Engines, as_segcore_error
from services.serving.logs import log_fields
from services.serving.messages import AnswerPart, Prompt, SessionInfo, UploadAck
from services.serving.metrics import METER
from services.serving.record import digest_of
from services.serving.status import code_of
from services.serving.tenants import OPEN, Quotas, Tenant, Tenants
from services.serving.tracing import span

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


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
        self.engines, self.config = Engines(engine.options(_by_reference=False), config), config
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
                call.error = as_segcore_error(error)
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

    async def check_sessions(self, tenant: Tenant, new_id: str) -> None:
        """Raise Busy if the tenant has as many sessions as it may; one that has the new one, too, calls again."""
        most = tenant.sessions
        if most is None or await self.engines.call("count", tenant.name, most=most) < most:
            return
        try:
            await self.engines.call("get", tenant.name, new_id)
        except NotFound:
            raise Busy(f"all {most} sessions are in use; delete one") from None

    async def import_session(self, tenant: Tenant, session_id: str, data: bytes, request_id: str) -> SessionInfo:
        """A session that was exported: what it holds counts, as a document's. Raises Busy."""
        await self.check_sessions(tenant, session_id)
        self._quotas.take(tenant, "tokens", 0)
        self._quotas.take(tenant, "bytes", len(data))
        info: SessionInfo = await self.engines.call(
            "import_session", tenant.name, session_id, data, request_id=request_id
        )
        self._quotas.charge(tenant, "tokens", info.processed_tokens + info.pending_tokens)
        return info

    async def append(
        self, tenant: Tenant, session_id: str, document_id: str, offset: int, data: bytes, ends: float | None = None
    ) -> UploadAck:
        """Bytes of a document, within the tenant's limits. Raises Busy, and what `Engines.append` raises."""
        self._quotas.take(tenant, "tokens", 0)
        self._quotas.take(tenant, "bytes", len(data))
        told = partial(self._quotas.charge, tenant, "tokens")
        ack = await self.engines.append(tenant.name, session_id, document_id, offset, data, ends, told)
        METER.count("segcore_uploaded_bytes", len(data))
        return ack

    async def finish(
        self,
        tenant: Tenant,
        session_id: str,
        document_id: str,
        total_bytes: int,
        sha256: bytes,
        ends: float | None = None,
    ) -> UploadAck:
        """`Engines.finish`; what it runs counts, and is never refused."""
        told = partial(self._quotas.charge, tenant, "tokens")
        return await self.engines.finish(tenant.name, session_id, document_id, total_bytes, sha256, ends, told)

    async def answer(
        self, tenant: Tenant, session_id: str, question: str, params: SamplingParams, **options: Any
    ) -> AsyncGenerator[AnswerPart]:
        """A session's answer, within the tenant's limit; options: those of `Engines.generate`."""
        self._quotas.take(tenant, "tokens", 0)
        answer = self.engines.generate(tenant.name, session_id, question, params, **options)
        async with aclosing(self._charged(tenant, answer, options.get("after", 0))) as parts:
            async for part in parts:
                yield part

    async def complete(
        self, tenant: Tenant, prompt: Prompt, params: SamplingParams, request_id: str = ""
    ) -> AsyncGenerator[AnswerPart]:
        """The answer to a prompt that stands for itself, within the tenant's limit.

        Under a request_id it is the same each time; raises AlreadyExists if that stood for another call.
        """
        self._quotas.take(tenant, "tokens", 0)
        if request_id:
            digest = digest_of("complete", prompt=prompt, params=asdict(params))
            await self.engines.call("once", tenant.name, request_id=request_id, digest=digest)
        async with aclosing(self._charged(tenant, self.engines.complete(tenant.name, prompt, params))) as parts:
            async for part in parts:
                yield part

    async def _charged(
        self, tenant: Tenant, answer: AsyncGenerator[AnswerPart], after: int = 0
    ) -> AsyncGenerator[AnswerPart]:
        """An answer's parts, each of which counts as it comes, so that who leaves before the end has paid, too."""
        input_tokens = 0
        async with aclosing(answer) as parts:
            async for part in parts:
                if part.input_tokens and not input_tokens:  # one that takes a prompt over tells it again
                    input_tokens = part.input_tokens
                    self._quotas.charge(tenant, "tokens", input_tokens)
                if part.input_tokens and not (part.token_index or part.finish_reason):
                    continue  # there is nothing else in it
                self._quotas.charge(tenant, "tokens", part.token_index - after)
                after = part.token_index
                yield part
