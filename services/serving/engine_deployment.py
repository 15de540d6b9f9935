"""The engine tier: one replica, one engine, the sessions that are routed to it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

import segcore
from segcore.errors import Unavailable
from segcore.sampling import SamplingParams
from services.serving.autoscaling import FIGURES
from services.serving.config import ServeConfig
from services.serving.logs import log_as_told
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
from services.serving.metrics import METER
from services.serving.tracing import stream_span


class EngineDeployment:
    """`Sessions` behind a deployment handle; its methods, and their options, are those; they raise SegcoreError.

    A session belongs to a tenant (up to 64 letters, digits, '-' or '_'; "" if none is told); others don't see it.
    """

    _runs = False

    def __init__(self, config: ServeConfig) -> None:
        # Imported here, so that the process that deploys needs no torch.
        import torch

        from services.serving.completion import Completions
        from services.serving.session import Sessions

        log_as_told()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._config = config = config.with_password()
        self._model = segcore.load_model(config.model, dtype=config.dtype, device=config.device, adapter=config.adapter)
        self._engine = segcore.Engine(self._model.lm, self._model.identified(config.engine_config()), config.cipher())
        self._sessions = Sessions(self._model, self._engine, config)
        self._completions = Completions(self._model, self._engine, self._sessions.room)
        self._runs = True

    def check_health(self) -> None:
        """Serve's question, every few seconds; metrics of the engine's state are brought up to date with it."""
        self.measure()
        if not self._engine.alive:
            raise Unavailable("the engine's thread has ended")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `LoadPolicy` goes by; Serve asks for it."""
        stats = self._engine.stats()
        return {name: getattr(stats, name) for name in FIGURES}

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Serve asks for the end so, and awaits it; what has ended, or never began, has none."""
        return self.end() if self._runs else None

    async def end(self) -> None:
        """End calls where they can go on elsewhere, then the engine."""
        self._runs = False
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
        began = time.monotonic()
        ack = await self._sessions.finish(tenant, session_id, document_id, total_bytes, sha256, **options)
        if ack.finished:
            METER.observe("segcore_last_byte_seconds", time.monotonic() - began)
        return ack

    async def get_document(self, tenant: str, session_id: str, document_id: str) -> DocumentInfo:
        return await self._sessions.get_document(tenant, session_id, document_id)

    async def document_bytes(self, tenant: str, session_id: str, document_id: str) -> bytes:
        return await self._sessions.document_bytes(tenant, session_id, document_id)

    async def cancel_answer(self, tenant: str, session_id: str, **options: Any) -> None:
        await self._sessions.cancel_answer(tenant, session_id, **options)

    async def generate(
        self, tenant: str, session_id: str, question: str, params: SamplingParams, **options: Any
    ) -> AsyncIterator[AnswerPart]:
        answer = self._sessions.generate(tenant, session_id, question, params, **options)
        async with aclosing(_timed(answer)) as parts:
            async for part in parts:
                yield part

    async def passages(self, tenant: str, session_id: str) -> list[Passage]:
        return await self._sessions.passages(tenant, session_id)

    async def count(self, tenant: str, most: int) -> int:
        return await self._sessions.count(tenant, most)

    async def once(self, tenant: str, **options: Any) -> None:
        await self._sessions.once(tenant, **options)

    async def complete(
        self, tenant: str, prompt: Prompt, params: SamplingParams, after: int
    ) -> AsyncIterator[AnswerPart]:
        async with aclosing(_timed(self._completions.complete(tenant, prompt, params, after))) as parts:
            async for part in parts:
                yield part

    def measure(self) -> None:
        """Bring the engine's metrics up to date."""
        stats = self._engine.stats()
        METER.gauge("segcore_sessions", stats.sessions)
        METER.gauge("segcore_slots_used", stats.slots)
        METER.gauge("segcore_queued_sessions", stats.queued_sessions)
        METER.gauge("segcore_queued_tokens", stats.queued_tokens)
        METER.gauge("segcore_engine_bytes", stats.engine_bytes)
        for tier, size in stats.past_bytes.items():
            METER.gauge("segcore_past_bytes", size, tier=tier)
        METER.totals("segcore_tier_faults", stats.faults, "fault")
        METER.totals("segcore_recoveries", {"": stats.counts.get("recoveries", 0)})
        for group, name, tag in _COUNTED:
            found = {key.removeprefix(group): value for key, value in stats.counts.items() if key.startswith(group)}
            METER.totals(name, found, tag)


_COUNTED = (
    ("tokens.", "segcore_run_tokens", "kind"),
    ("segments.", "segcore_segments", "outcome"),
    ("restored.", "segcore_restored_segments", "outcome"),
    ("index.", "segcore_index_tokens", "kind"),
)


async def _timed(parts: AsyncGenerator[AnswerPart]) -> AsyncGenerator[AnswerPart]:
    """An answer's parts, measured."""
    began, first, before = time.monotonic(), None, 0
    with stream_span("engine answer") as made:
        async with aclosing(parts):
            async for part in parts:
                now = time.monotonic()
                if first is None and part.token_index:
                    first, before = now, part.token_index
                    METER.observe("segcore_first_token_seconds", now - began)
                if part.finish_reason is not None:
                    METER.count("segcore_answer_tokens", part.answer_tokens)
                    if first is not None and part.token_index > before:
                        METER.observe("segcore_token_seconds", (now - first) / (part.token_index - before))
                    if made is not None:
                        made.set_attributes({"prompt_tokens": part.prompt_tokens, "answer_tokens": part.answer_tokens})
                yield part
