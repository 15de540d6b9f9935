"""The client for asyncio."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import grpc

from protos.gen.segcore.v1 import segcore_pb2 as pb
from protos.gen.segcore.v1 import segcore_pb2_grpc as stubs
from segcore.errors import Busy, DeadlineExceeded, SegcoreError, Unavailable
from segcore.sampling import SamplingParams
from services.serving import codec
from services.serving.client.retries import Deadline, Patience, retried, typed_errors
from services.serving.client.upload import OnProgress, Source, Upload, reading
from services.serving.messages import AnswerPart, DocumentInfo, SessionInfo, UploadAck

_OPTIONS = [("grpc.keepalive_time_ms", 30_000), ("grpc.max_receive_message_length", 16 * 2**20)]
_IMPORT_BYTES = 2**20
_GIVE_UP_S = 2.0


class AsyncClient:
    """Talks to one service. All calls raise SegcoreError; those that can be repeated safely are, for some seconds."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        ca: Path | bool = False,
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        """token: a tenant's bearer token. ca: with TLS; the authority's certificate, True for those the system trusts.

        certificate: the client's own, and its key, where the service asks for one.
        """
        self._channel = _channel(address, ca, certificate)
        self._who = () if token is None else (("authorization", f"Bearer {token}"),)
        self._sessions = stubs.SessionServiceStub(self._channel)
        self._documents = stubs.DocumentServiceStub(self._channel)
        self._generation = stubs.GenerationServiceStub(self._channel)
        self._info = stubs.InfoServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    def _route(self, session_id: str) -> tuple[tuple[str, str], ...]:
        """The metadata by which a session's calls are routed, and that say who calls."""
        return (("session_id", session_id), *self._who)

    async def server_info(self) -> pb.GetServerInfoResponse:
        request = pb.GetServerInfoRequest()
        response: pb.GetServerInfoResponse = await retried(
            lambda: self._info.GetServerInfo(request, metadata=self._who)
        )
        return response

    async def create_session(
        self, session_id: str | None = None, *, model: str = "", ttl_s: float | None = None
    ) -> SessionInfo:
        """Begin a session, under a name of the caller's or a new one. ttl_s: how long it outlives its last call."""
        name = session_id or uuid.uuid4().hex
        request = pb.CreateSessionRequest(
            session_id=name, model=model, ttl=codec.duration(ttl_s), request_id=uuid.uuid4().hex
        )
        response = await retried(lambda: self._sessions.CreateSession(request, metadata=self._route(name)))
        return codec.session_from(response.session)

    async def get_session(self, session_id: str) -> SessionInfo:
        request = pb.GetSessionRequest(session_id=session_id)
        response = await retried(lambda: self._sessions.GetSession(request, metadata=self._route(session_id)))
        return codec.session_from(response.session)

    async def list_sessions(self) -> AsyncIterator[SessionInfo]:
        """All sessions, in the order of their ids."""
        request = pb.ListSessionsRequest()
        while True:
            response = await retried(lambda: self._sessions.ListSessions(request, metadata=self._who))
            for session in response.sessions:
                yield codec.session_from(session)
            request.page_token = response.next_page_token
            if not request.page_token:
                return

    async def delete_session(self, session_id: str, *, expected_generation: int | None = None) -> None:
        request = pb.DeleteSessionRequest(
            session_id=session_id, expected_generation=expected_generation, request_id=uuid.uuid4().hex
        )
        await retried(lambda: self._sessions.DeleteSession(request, metadata=self._route(session_id)))

    async def fork_session(
        self, session_id: str, new_session_id: str | None = None, *, expected_generation: int | None = None
    ) -> SessionInfo:
        """A second session that goes on from where this one stands."""
        request = pb.ForkSessionRequest(
            session_id=session_id,
            new_session_id=new_session_id or uuid.uuid4().hex,
            expected_generation=expected_generation,
            request_id=uuid.uuid4().hex,
        )
        response = await retried(lambda: self._sessions.ForkSession(request, metadata=self._route(session_id)))
        return codec.session_from(response.session)

    async def rewind_session(
        self, session_id: str, tokens: int, *, expected_generation: int | None = None
    ) -> SessionInfo:
        """Go back to one of the session's `points`, or to 0; what came after is forgotten."""
        request = pb.RewindSessionRequest(
            session_id=session_id,
            tokens=tokens,
            expected_generation=expected_generation,
            request_id=uuid.uuid4().hex,
        )
        response = await retried(lambda: self._sessions.RewindSession(request, metadata=self._route(session_id)))
        return codec.session_from(response.session)

    async def export_session(self, session_id: str) -> bytes:
        """The session as bytes: its texts and tokens."""
        with typed_errors():
            call = self._sessions.ExportSession(
                pb.ExportSessionRequest(session_id=session_id), metadata=self._route(session_id)
            )
            return b"".join([response.data async for response in call])

    async def import_session(self, data: bytes, session_id: str | None = None) -> SessionInfo:
        """A new session that goes on where an exported one stood."""
        name, request_id = session_id or uuid.uuid4().hex, uuid.uuid4().hex

        async def requests() -> AsyncIterator[pb.ImportSessionRequest]:
            for start in range(0, len(data), _IMPORT_BYTES):
                piece = data[start : start + _IMPORT_BYTES]
                yield pb.ImportSessionRequest(session_id=name, request_id=request_id, data=piece)

        response = await retried(lambda: self._sessions.ImportSession(requests(), metadata=self._route(name)))
        return codec.session_from(response.session)

    async def get_document(self, session_id: str, document_id: str) -> DocumentInfo:
        request = pb.GetDocumentRequest(session_id=session_id, document_id=document_id)
        response = await retried(lambda: self._documents.GetDocument(request, metadata=self._route(session_id)))
        return codec.document_from(response.document)

    async def upload(
        self,
        session_id: str,
        source: Source,
        *,
        document_id: str | None = None,
        on_progress: OnProgress | None = None,
        timeout_s: float | None = None,
        expected_generation: int | None = None,
    ) -> UploadAck:
        """Stream a document into a session; returns when all of it has been run.

        source: a path, a string, bytes, or a binary file, which is read as fast as the service takes it. A broken
        connection is taken up where it broke. on_progress is called for every acknowledgement. timeout_s: for all of
        it; then DeadlineExceeded says the committed_offset, and another call, under the same document_id, goes on
        there. expected_generation: the only one at which the upload is to begin; else it raises Conflict.
        """
        with reading(source) as file:
            name = document_id or uuid.uuid4().hex
            told, deadline = on_progress or (lambda _: None), Deadline(timeout_s)
            upload = Upload(self.open_upload, session_id, name, file, told, deadline, expected_generation)
            return await upload.run()

    async def generate(
        self,
        session_id: str,
        question: str,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        after_token: int = 0,
        timeout_s: float | None = None,
        expected_generation: int | None = None,
    ) -> AsyncIterator[AnswerPart]:
        """Ask about what was uploaded; the answer's parts as they come. Closing the iterator ends the answer.

        A stream that breaks is taken up where it broke. With a request_id, another client can do so, too, or read the
        answer again: the part after `after_token` tokens. timeout_s: for all of it; then DeadlineExceeded says the
        token_index; an answer without a request_id ends there. expected_generation: the only one at which the question
        is to be asked; else it raises Conflict.
        """
        deadline = Deadline(timeout_s)
        request = pb.GenerateRequest(
            session_id=session_id,
            question=question,
            sampling=codec.sampling_to(params or SamplingParams()),
            request_id=request_id or uuid.uuid4().hex,
            after_token=after_token,
            expected_generation=expected_generation,
        )
        patience = Patience(deadline)
        while True:
            if (left := codec.duration(deadline.left_s)) is not None:
                request.timeout.CopyFrom(left)
            call = self._generation.Generate(request, metadata=self._route(session_id), timeout=deadline.wait_s)
            try:
                with typed_errors():
                    async for response in call:
                        # What has neither only carries a failure's status.
                        if response.token_index or response.HasField("usage"):
                            patience, request.after_token = Patience(deadline), response.token_index
                            yield codec.answer_from(response)
                return
            except SegcoreError as error:
                try:
                    await patience.wait(error)
                except (Busy, DeadlineExceeded, Unavailable) as last:
                    last.details.setdefault("token_index", str(request.after_token))
                    if request_id is None:  # nobody can take it up
                        await self._give_up(session_id, request.request_id)
                    raise
            finally:
                if not call.done():
                    call.cancel()
                    await self.cancel_answer(session_id, request_id=request.request_id)

    async def cancel_answer(self, session_id: str, *, request_id: str = "") -> None:
        """End the session's answer, if it is answering: this client's, or that of one that is gone.

        request_id: of the answer that is meant; "" is any.
        """
        request = pb.CancelAnswerRequest(session_id=session_id, request_id=request_id)
        await retried(lambda: self._generation.CancelAnswer(request, metadata=self._route(session_id)))

    async def _give_up(self, session_id: str, request_id: str) -> None:
        """End an answer if the service can be reached just now."""
        request = pb.CancelAnswerRequest(session_id=session_id, request_id=request_id)
        with suppress(grpc.aio.AioRpcError):
            await self._generation.CancelAnswer(request, metadata=self._route(session_id), timeout=_GIVE_UP_S)

    def open_upload(self, session_id: str) -> Any:
        """The bare bidirectional call, for those who speak the protocol themselves."""
        return self._documents.UploadDocument(metadata=self._route(session_id))


def _channel(address: str, ca: Path | bool, certificate: tuple[Path, Path] | None) -> grpc.aio.Channel:
    if not ca:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    chain, key = (None, None) if certificate is None else (file.read_bytes() for file in certificate)
    authority = ca.read_bytes() if isinstance(ca, Path) else None
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(authority, key, chain), options=_OPTIONS)
