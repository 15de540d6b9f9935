"""What stands between callers and engines, whichever protocol they speak."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from segcore.errors import SegcoreError, Unavailable
from segcore.sampling import SamplingParams
from services.serving.config import ServeConfig
from services.serving.messages import AnswerPart, Prompt, ServerInfo, UploadAck, check_name
from services.serving.tenants import Quotas, Tenant, Tenants

log = logging.getLogger(__name__)


class Gate:
    """Admits callers, and finds the engine of a session. Stateless but for what tenants have used of their limits."""

    def __init__(self, engine: DeploymentHandle, config: ServeConfig) -> None:
        """Raises ConfigError for a tenants' file that can't be used."""
        self._engine, self.config = engine, config
        self._tenants, self._quotas = Tenants(config.tenants), Quotas(config.fronts)

    def admit(self, authorization: str | None) -> Tenant:
        """Who calls, if the token is known and its tenant may make one more call. Raises Unauthenticated, Busy."""
        tenant = self._tenants.authenticate(authorization)
        self._quotas.take(tenant, "requests")
        return tenant

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
        ack: UploadAck = await self.engine(session_id).append.remote(tenant.name, session_id, document_id, offset, data)
        return ack

    async def answer(
        self, tenant: Tenant, session_id: str, question: str, params: SamplingParams
    ) -> AsyncGenerator[AnswerPart]:
        """A session's answer, within the tenant's limit. Closing the iterator ends the answer."""
        self._quotas.take(tenant, "tokens", 0)
        engine = self.engine(session_id).options(stream=True)
        async with aclosing(_parts(engine.generate.remote(tenant.name, session_id, question, params))) as parts:
            async for part in parts:
                self._quotas.charge(tenant, "tokens", part.answer_tokens)
                yield part

    async def complete(self, tenant: Tenant, prompt: Prompt, params: SamplingParams) -> AsyncGenerator[AnswerPart]:
        """The answer to a prompt that stands for itself, within the tenant's limit, as `answer`."""
        self._quotas.take(tenant, "tokens", 0)
        engine = self._engine.options(session_id=uuid.uuid4().hex, stream=True)
        async with aclosing(_parts(engine.complete.remote(tenant.name, prompt, params))) as parts:
            async for part in parts:
                self._quotas.charge(tenant, "tokens", part.prompt_tokens + part.answer_tokens)
                yield part


async def _parts(response: Any) -> AsyncGenerator[AnswerPart]:
    try:
        async for part in response:
            yield part
    finally:
        response.cancel()  # ends the answer if the client went away; no effect once it has ended


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
