"""The engine tier: one replica, one engine, the sessions that are routed to it."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

import segcore
from segcore.errors import Unavailable
from segcore.sampling import SamplingParams
from services.serving.config import ServeConfig
from services.serving.messages import AnswerPart, DocumentInfo, Prompt, ServerInfo, SessionInfo, UploadAck


class EngineDeployment:
    """`Sessions` behind a deployment handle; its methods raise SegcoreError.

    A session belongs to a tenant (up to 64 letters, digits, '-' or '_'; "" if none is told); others don't see it.
    """

    def __init__(self, config: ServeConfig) -> None:
        # Imported here, so that the process that deploys needs no torch.
        import torch

        from services.serving.completion import Completions
        from services.serving.session import Sessions

        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._config = config
        self._model = segcore.load_model(config.model, dtype=config.dtype, device=config.device, adapter=config.adapter)
        self._engine = segcore.Engine(self._model.lm, self._model.identified(config.engine_config()))
        self._sessions = Sessions(self._model, self._engine, config)
        self._completions = Completions(self._model, self._engine)

    def check_health(self) -> None:
        if not self._engine.alive:
            raise Unavailable("the engine's thread has ended")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `LoadPolicy` goes by; Serve asks for it."""
        return dataclasses.asdict(self._engine.load())

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.shutdown()

    async def info(self) -> ServerInfo:
        config, layout = self._config, self._engine.past_layout
        return ServerInfo(
            version=segcore.__version__,
            model=self._model.name,
            architecture=self._model.lm.spec.architecture,
            policy=self._engine.config.segment.policy,
            segment_tokens=self._engine.config.segment.segment_tokens,
            max_sessions=config.max_sessions,
            max_session_tokens=self._engine.max_stream_tokens,
            max_document_bytes=config.max_document_bytes,
            max_data_bytes=config.max_data_bytes,
            window_bytes=config.window_bytes,
            past_bytes_per_token=0 if layout is None else layout.block_bytes_per_token + layout.index_bytes_per_token,
        )

    async def create(self, tenant: str, session_id: str, model: str) -> SessionInfo:
        return await self._sessions.create(tenant, session_id, model)

    async def get(self, tenant: str, session_id: str) -> SessionInfo:
        return await self._sessions.get(tenant, session_id)

    async def delete(self, tenant: str, session_id: str) -> None:
        await self._sessions.delete(tenant, session_id)

    async def open_document(self, tenant: str, session_id: str, document_id: str, total_bytes: int | None) -> UploadAck:
        return await self._sessions.open_document(tenant, session_id, document_id, total_bytes)

    async def append(self, tenant: str, session_id: str, document_id: str, offset: int, data: bytes) -> UploadAck:
        return await self._sessions.append(tenant, session_id, document_id, offset, data)

    async def finish(
        self, tenant: str, session_id: str, document_id: str, total_bytes: int, sha256: bytes
    ) -> UploadAck:
        return await self._sessions.finish(tenant, session_id, document_id, total_bytes, sha256)

    async def get_document(self, tenant: str, session_id: str, document_id: str) -> DocumentInfo:
        return await self._sessions.get_document(tenant, session_id, document_id)

    async def cancel_answer(self, tenant: str, session_id: str) -> None:
        await self._sessions.cancel_answer(tenant, session_id)

    async def generate(
        self, tenant: str, session_id: str, question: str, params: SamplingParams
    ) -> AsyncIterator[AnswerPart]:
        async for part in self._sessions.generate(tenant, session_id, question, params):
            yield part

    async def complete(self, tenant: str, prompt: Prompt, params: SamplingParams) -> AsyncIterator[AnswerPart]:
        async for part in self._completions.complete(tenant, prompt, params):
            yield part
