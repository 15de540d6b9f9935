"""The client for code that isn't asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Self, TypeVar

from protos.gen.segcore.v1 import segcore_pb2 as pb
from segcore.sampling import SamplingParams
from services.serving.client.asynchronous import AsyncClient
from services.serving.client.upload import OnProgress, Source
from services.serving.messages import AnswerPart, DocumentInfo, SessionInfo, UploadAck

T = TypeVar("T")


class Client:
    """`AsyncClient` for code that isn't asynchronous: the same calls, run on a loop in a thread of its own."""

    def __init__(self, address: str, **options: Any) -> None:
        """options: those of AsyncClient."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="segcore-client", daemon=True)
        self._thread.start()
        self._client = self._run(_made(lambda: AsyncClient(address, **options)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def server_info(self) -> pb.GetServerInfoResponse:
        return self._run(self._client.server_info())

    def create_session(
        self, session_id: str | None = None, *, model: str = "", ttl_s: float | None = None
    ) -> SessionInfo:
        return self._run(self._client.create_session(session_id, model=model, ttl_s=ttl_s))

    def get_session(self, session_id: str) -> SessionInfo:
        return self._run(self._client.get_session(session_id))

    def list_sessions(self) -> Iterator[SessionInfo]:
        sessions = self._client.list_sessions()
        while (session := self._run(_next_or_none(sessions))) is not None:
            yield session

    def delete_session(self, session_id: str, *, expected_generation: int | None = None) -> None:
        self._run(self._client.delete_session(session_id, expected_generation=expected_generation))

    def fork_session(
        self, session_id: str, new_session_id: str | None = None, *, expected_generation: int | None = None
    ) -> SessionInfo:
        return self._run(self._client.fork_session(session_id, new_session_id, expected_generation=expected_generation))

    def rewind_session(self, session_id: str, tokens: int, *, expected_generation: int | None = None) -> SessionInfo:
        return self._run(self._client.rewind_session(session_id, tokens, expected_generation=expected_generation))

    def export_session(self, session_id: str) -> bytes:
        return self._run(self._client.export_session(session_id))

    def import_session(self, data: bytes, session_id: str | None = None) -> SessionInfo:
        return self._run(self._client.import_session(data, session_id))

    def get_document(self, session_id: str, document_id: str) -> DocumentInfo:
        return self._run(self._client.get_document(session_id, document_id))

    def upload(
        self,
        session_id: str,
        source: Source,
        *,
        document_id: str | None = None,
        on_progress: OnProgress | None = None,
        timeout_s: float | None = None,
        expected_generation: int | None = None,
    ) -> UploadAck:
        return self._run(
            self._client.upload(
                session_id,
                source,
                document_id=document_id,
                on_progress=on_progress,
                timeout_s=timeout_s,
                expected_generation=expected_generation,
            )
        )

    def generate(
        self,
        session_id: str,
        question: str,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        after_token: int = 0,
        timeout_s: float | None = None,
        expected_generation: int | None = None,
    ) -> Iterator[AnswerPart]:
        parts = self._client.generate(
            session_id,
            question,
            params,
            request_id=request_id,
            after_token=after_token,
            timeout_s=timeout_s,
            expected_generation=expected_generation,
        )
        try:
            while (part := self._run(_next_or_none(parts))) is not None:
                yield part
        finally:
            self._run(parts.aclose())  # type: ignore[attr-defined]

    def cancel_answer(self, session_id: str, *, request_id: str = "") -> None:
        self._run(self._client.cancel_answer(session_id, request_id=request_id))

    def _run(self, work: Awaitable[T]) -> T:
        future = asyncio.run_coroutine_threadsafe(_awaited(work), self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise


async def _awaited(work: Awaitable[T]) -> T:
    return await work


async def _made(make: Callable[[], T]) -> T:
    return make()


async def _next_or_none(parts: AsyncIterator[T]) -> T | None:
    return await anext(parts, None)
