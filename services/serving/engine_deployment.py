"""The engine tier: one replica, one engine, the sessions that are routed to it."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import segcore
from segcore.errors import Unavailable
from segcore.sampling import SamplingParams
from services.serving.config import ServeConfig
from services.serving.messages import (
    AnswerPart,
    DocumentInfo,
    Passage,
    Prompt,
    ServerInfo,
    SessionInfo,
    SessionPage,
    UploadAck,
)


class EngineDeployment:
    """`Sessions` behind a deployment handle; its methods, and their options, are those; they raise SegcoreError.

    A session belongs to a tenant (up to 64 letters, digits, '-' or '_'; "" if none is told); others don't see it.
    """

    def __init__(self, config: ServeConfig) -> None:
        # Imported here, so that the process that deploys needs no torch.
        import torch

        from services.serving.completion import Completions
        from services.serving.session import Sessions

        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._config = config = config.with_password()
        self._model = segcore.load_model(config.model, dtype=config.dtype, device=config.device, adapter=config.adapter)
        self._engine = segcore.Engine(self._model.lm, self._model.identified(config.engine_config()))
        self._sessions = Sessions(self._model, self._engine, config)
        self._completions = Completions(self._model, self._engine, self._sessions.room)

    def check_health(self) -> None:
        if not self._engine.alive:
            raise Unavailable("the engine's thread has ended")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `LoadPolicy` goes by; Serve asks for it."""
        return dataclasses.asdict(self._engine.load())

    async def __del__(self) -> None:
        if hasattr(self, "_sessions"):
            await self._sessions.drain()
            self._sessions.close()
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

    async def create(self, tenant: str, session_id: str, model: str = "", **options: Any) -> SessionInfo:
        return await self._sessions.create(tenant, session_id, model, **options)

    async def get(self, tenant: str, session_id: str) -> SessionInfo:
        return await self._sessions.get(tenant, session_id)

    async def list_sessions(self, tenant: str, page_size: int = 100, page_token: str = "") -> SessionPage:
        return await self._sessions.list_sessions(tenant, page_size, page_token)

    async def delete(self, tenant: str, session_id: str, **options: Any) -> None:
        await self._sessions.delete(tenant, session_id, **options)

    async def fork(self, tenant: str, session_id: str, new_id: str, **options: Any) -> SessionInfo:
        return await self._sessions.fork(tenant, session_id, new_id, **options)

    async def rewind(self, tenant: str, session_id: str, tokens: int, **options: Any) -> SessionInfo:
        return await self._sessions.rewind(tenant, session_id, tokens, **options)

    async def export(self, tenant: str, session_id: str) -> AsyncIterator[bytes]:
        async for data in self._sessions.export(tenant, session_id):
            yield data

    async def import_session(self, tenant: str, session_id: str, data: bytes, **options: Any) -> SessionInfo:
        return await self._sessions.import_session(tenant, session_id, data, **options)

    async def open_document(
        self, tenant: str, session_id: str, document_id: str, total_bytes: int | None, **options: Any
    ) -> UploadAck:
        return await self._sessions.open_document(tenant, session_id, document_id, total_bytes, **options)

    async def append(
        self, tenant: str, session_id: str, document_id: str, offset: int, data: bytes, **options: Any
    ) -> UploadAck:
        return await self._sessions.append(tenant, session_id, document_id, offset, data, **options)

    async def finish(
        self, tenant: str, session_id: str, document_id: str, total_bytes: int, sha256: bytes, **options: Any
    ) -> UploadAck:
        return await self._sessions.finish(tenant, session_id, document_id, total_bytes, sha256, **options)

    async def get_document(self, tenant: str, session_id: str, document_id: str) -> DocumentInfo:
        return await self._sessions.get_document(tenant, session_id, document_id)

    async def document_bytes(self, tenant: str, session_id: str, document_id: str) -> bytes:
        return await self._sessions.document_bytes(tenant, session_id, document_id)

    async def cancel_answer(self, tenant: str, session_id: str) -> None:
        await self._sessions.cancel_answer(tenant, session_id)

    async def generate(
        self, tenant: str, session_id: str, question: str, params: SamplingParams, **options: Any
    ) -> AsyncIterator[AnswerPart]:
        async with aclosing(self._sessions.generate(tenant, session_id, question, params, **options)) as parts:
            async for part in parts:
                yield part

    async def passages(self, tenant: str, session_id: str) -> list[Passage]:
        return await self._sessions.passages(tenant, session_id)

    async def count(self, tenant: str, most: int) -> int:
        return await self._sessions.count(tenant, most)

    async def complete(
        self, tenant: str, prompt: Prompt, params: SamplingParams, after: int
    ) -> AsyncIterator[AnswerPart]:
        async with aclosing(self._completions.complete(tenant, prompt, params, after)) as parts:
            async for part in parts:
                yield part
