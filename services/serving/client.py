"""Clients of a segcore service, asynchronous and synchronous. They hide offsets, back-pressure, retries, resumption.

    with Client("127.0.0.1:9100") as client:
        session = client.create_session()
        client.upload(session.session_id, Path("book.txt"))
        for part in client.generate(session.session_id, "Who did it?"):
            print(part.text, end="")

Every failure is a `segcore.errors.SegcoreError`.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import grpc

from protos.gen.segcore.v1 import segcore_pb2 as pb
from protos.gen.segcore.v1 import segcore_pb2_grpc as stubs
from segcore.errors import AlreadyExists, FailedPrecondition, SegcoreError, Unavailable
from segcore.sampling import SamplingParams
from services.serving import codec
from services.serving.messages import AnswerPart, DocumentInfo, SessionInfo, UploadAck
from services.serving.status import error_of

Source = Path | bytes | str | BinaryIO
OnProgress = Callable[[UploadAck], None]
T = TypeVar("T")

_OPTIONS = [("grpc.keepalive_time_ms", 30_000), ("grpc.max_receive_message_length", 16 * 2**20)]
_RETRY_SECONDS = (0.1, 0.3, 1.0, 3.0, 6.0)
_IMPORT_BYTES = 2**20


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
        with _errors():
            response: pb.GetServerInfoResponse = await self._info.GetServerInfo(
                pb.GetServerInfoRequest(), metadata=self._who
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
        response = await _retried(lambda: self._sessions.CreateSession(request, metadata=self._route(name)))
        return codec.session_from(response.session)

    async def get_session(self, session_id: str) -> SessionInfo:
        request = pb.GetSessionRequest(session_id=session_id)
        response = await _retried(lambda: self._sessions.GetSession(request, metadata=self._route(session_id)))
        return codec.session_from(response.session)

    async def list_sessions(self) -> AsyncIterator[SessionInfo]:
        """All sessions, in the order of their ids."""
        token = ""
        while True:
            request = pb.ListSessionsRequest(page_token=token)
            response = await _retried(lambda request=request: self._sessions.ListSessions(request))  # type: ignore[misc]
            for session in response.sessions:
                yield codec.session_from(session)
            token = response.next_page_token
            if not token:
                return

    async def delete_session(self, session_id: str, *, expected_generation: int | None = None) -> None:
        request = pb.DeleteSessionRequest(
            session_id=session_id, expected_generation=expected_generation, request_id=uuid.uuid4().hex
        )
        await _retried(lambda: self._sessions.DeleteSession(request, metadata=self._route(session_id)))

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
        response = await _retried(lambda: self._sessions.ForkSession(request, metadata=self._route(session_id)))
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
        response = await _retried(lambda: self._sessions.RewindSession(request, metadata=self._route(session_id)))
        return codec.session_from(response.session)

    async def export_session(self, session_id: str) -> bytes:
        """The session as bytes: its texts and tokens."""
        with _errors():
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

        response = await _retried(lambda: self._sessions.ImportSession(requests(), metadata=self._route(name)))
        return codec.session_from(response.session)

    async def get_document(self, session_id: str, document_id: str) -> DocumentInfo:
        request = pb.GetDocumentRequest(session_id=session_id, document_id=document_id)
        response = await _retried(lambda: self._documents.GetDocument(request, metadata=self._route(session_id)))
        return codec.document_from(response.document)

    async def upload(
        self,
        session_id: str,
        source: Source,
        *,
        document_id: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> UploadAck:
        """Stream a document into a session; returns when all of it has been run.

        source: a path, a string, bytes, or a binary file, which is read as fast as the service takes it. A broken
        connection is taken up where it broke. on_progress is called for every acknowledgement.
        """
        with _reading(source) as file:
            upload = _Upload(self, session_id, document_id or uuid.uuid4().hex, file, on_progress or (lambda _: None))
            return await upload.run()

    async def generate(
        self,
        session_id: str,
        question: str,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        after_token: int = 0,
    ) -> AsyncIterator[AnswerPart]:
        """Ask about what was uploaded; the answer's parts as they come. Closing the iterator ends the answer.

        A stream that breaks is taken up where it broke. With a request_id, another client can do so, too, or read the
        answer again: the part after `after_token` tokens.
        """
        request = pb.GenerateRequest(
            session_id=session_id,
            question=question,
            sampling=codec.sampling_to(params or SamplingParams()),
            request_id=request_id or uuid.uuid4().hex,
            after_token=after_token,
        )
        patience = _Patience()
        while True:
            call = self._generation.Generate(request, metadata=self._route(session_id))
            try:
                with _errors():
                    async for response in call:
                        if response.token_index or response.HasField(
                            "usage"
                        ):  # else it only carries a failure's status
                            patience, request.after_token = _Patience(), response.token_index
                            yield codec.answer_from(response)
                return
            except SegcoreError as error:
                await patience.wait(error)
            finally:
                if not call.done():
                    call.cancel()
                    await self.cancel_answer(session_id)

    async def cancel_answer(self, session_id: str) -> None:
        """End the session's answer, if it is answering: this client's, or that of one that is gone."""
        request = pb.CancelAnswerRequest(session_id=session_id)
        await _retried(lambda: self._generation.CancelAnswer(request, metadata=self._route(session_id)))

    def open_upload(self, session_id: str) -> Any:
        """The bare bidirectional call, for those who speak the protocol themselves."""
        return self._documents.UploadDocument(metadata=self._route(session_id))


class _Upload:
    """One document on its way. Bytes are kept until they are committed, so that any source can be taken up again."""

    def __init__(
        self, client: AsyncClient, session_id: str, document_id: str, file: BinaryIO, on_progress: OnProgress
    ) -> None:
        self._client, self._session_id, self._document_id = client, session_id, document_id
        self._file, self._on_progress = file, on_progress
        self._digest = hashlib.sha256()
        self._kept = bytearray()  # bytes [committed, read) of the document
        self._committed = 0
        self._window = 0
        self._ended = False
        self._sent_finish = False
        self._acknowledged = asyncio.Event()

    async def run(self) -> UploadAck:
        patience = _Patience()
        while True:
            before = self._committed
            try:
                return await self._attempt()
            except SegcoreError as error:
                if self._committed > before:  # it went on meanwhile: a new fault, with patience of its own
                    patience = _Patience()
                await patience.wait(error)

    async def _attempt(self) -> UploadAck:
        call = self._client.open_upload(self._session_id)
        acks: asyncio.Task[UploadAck] | None = None
        try:
            header = pb.DocumentHeader(session_id=self._session_id, document_id=self._document_id)
            await call.write(pb.UploadDocumentRequest(header=header))
            ack = await self._take_ack(call)
            if ack.finished:  # ours, and only the answer to its finish was lost
                return ack
            acks = asyncio.create_task(self._take_acks(call))
            await self._send(call, acks)
            return await acks
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # A write that fails says little; the status with which the call ended says why.
            raise await _ended_early(call) from None
        finally:
            call.cancel()
            if acks is not None:
                acks.cancel()
                await asyncio.gather(acks, return_exceptions=True)

    async def _send(self, call: Any, acks: asyncio.Task[UploadAck]) -> None:
        """Send from the committed offset on, never more than the window beyond it; then finish."""
        sent = self._committed
        while data := await self._next_bytes(sent):
            await call.write(pb.UploadDocumentRequest(data=pb.DocumentData(offset=sent, data=data)))
            sent += len(data)
            while sent - self._committed >= self._window and not acks.done():
                self._acknowledged.clear()
                news = asyncio.create_task(self._acknowledged.wait())
                await asyncio.wait([acks, news], return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
            if acks.done():
                return
        self._sent_finish = True
        finish = pb.DocumentFinish(total_bytes=sent, sha256=self._digest.digest())
        await call.write(pb.UploadDocumentRequest(finish=finish))

    async def _take_acks(self, call: Any) -> UploadAck:
        """Take acknowledgements until the one that ends the upload."""
        while not (ack := await self._take_ack(call)).finished:
            pass
        return ack

    async def _next_bytes(self, offset: int) -> bytes:
        """The next message's bytes; empty at the document's end."""
        size = max(1, self._window // 4)
        if offset - self._committed == len(self._kept):
            await self._read(size)
        start = offset - self._committed  # only now: acknowledgements move it while the source is read
        return bytes(self._kept[start : start + size])

    async def _read(self, size: int) -> None:
        if not self._ended:
            data = await asyncio.to_thread(self._file.read, size)
            self._ended = not data
            self._digest.update(data)
            self._kept += data

    async def _read_to(self, offset: int) -> None:
        """Catch up with a document that an earlier client began: its bytes count for the digest only."""
        while self._committed + len(self._kept) < offset and not self._ended:
            await self._read(offset - self._committed - len(self._kept))

    async def _take_ack(self, call: Any) -> UploadAck:
        response = await call.read()
        if response is grpc.aio.EOF:
            raise await _ended_early(call)
        if not response.HasField("progress"):  # the empty message before a failure's status
            return await self._take_ack(call)
        ack = codec.ack_from(response)
        await self._read_to(ack.committed_offset)
        taken = ack.committed_offset - self._committed
        if not 0 <= taken <= len(self._kept):
            raise FailedPrecondition(
                f"the service has {ack.committed_offset} bytes of document {self._document_id!r}, which this upload"
                f" can't continue: it holds bytes {self._committed} to {self._committed + len(self._kept)}"
            )
        if ack.finished and not self._sent_finish:
            raise AlreadyExists(f"document {self._document_id!r} is already uploaded; choose another id")
        del self._kept[:taken]
        self._committed, self._window = ack.committed_offset, response.window_bytes
        self._acknowledged.set()
        self._on_progress(ack)
        return ack


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
    ) -> UploadAck:
        return self._run(self._client.upload(session_id, source, document_id=document_id, on_progress=on_progress))

    def generate(
        self,
        session_id: str,
        question: str,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        after_token: int = 0,
    ) -> Iterator[AnswerPart]:
        parts = self._client.generate(session_id, question, params, request_id=request_id, after_token=after_token)
        try:
            while (part := self._run(_next_or_none(parts))) is not None:
                yield part
        finally:
            self._run(parts.aclose())  # type: ignore[attr-defined]

    def cancel_answer(self, session_id: str) -> None:
        self._run(self._client.cancel_answer(session_id))

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


class _Patience:
    """Pauses between tries, as the service asks for, or ever longer."""

    def __init__(self) -> None:
        self._pauses = iter(_RETRY_SECONDS)

    async def wait(self, error: SegcoreError) -> None:
        """Pause before the next try; raises the error if there is to be none."""
        asked = error.details.get("retry_after_s")
        pause = next(self._pauses, None) if isinstance(error, Unavailable) or asked is not None else None
        if pause is None:
            raise error
        await asyncio.sleep(pause if asked is None else min(max(float(asked), pause), _RETRY_SECONDS[-1]))


async def _retried(call: Callable[[], Awaitable[T]]) -> T:
    patience = _Patience()
    while True:
        try:
            with _errors():
                return await call()
        except SegcoreError as error:
            await patience.wait(error)


async def _ended_early(call: Any) -> SegcoreError:
    """Why a call ended without the message that was due."""
    code = await call.code()
    if code is grpc.StatusCode.OK:
        return Unavailable("the service ended the upload before its finish")
    return error_of(
        grpc.aio.AioRpcError(code, await call.initial_metadata(), await call.trailing_metadata(), await call.details())
    )


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_of(error) from None


@contextmanager
def _reading(source: Source) -> Iterator[BinaryIO]:
    if isinstance(source, Path):
        with source.open("rb") as file:
            yield file
    elif isinstance(source, (bytes, str)):
        yield io.BytesIO(source.encode() if isinstance(source, str) else source)
    else:
        yield source


def _channel(address: str, ca: Path | bool, certificate: tuple[Path, Path] | None) -> grpc.aio.Channel:
    if not ca:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    chain, key = (None, None) if certificate is None else (file.read_bytes() for file in certificate)
    authority = ca.read_bytes() if isinstance(ca, Path) else None
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(authority, key, chain), options=_OPTIONS)
