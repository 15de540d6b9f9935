"""Sessions as clients see them: documents of bytes, questions and answers of text. Knows no Ray and no gRPC.

One asyncio loop drives it; the engine works on its own thread. What a call has changed is in the directory before
anything is answered, so a call that is made again, here or on another replica, goes on where the last one ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing

from segcore.engine.engine import Engine
from segcore.errors import NotFound
from segcore.sampling import SamplingParams
from segcore.weights import LoadedModel
from services.serving.answers import Answers
from services.serving.catalog import Catalog, name_of
from services.serving.config import ServeConfig
from services.serving.directory import open_directory
from services.serving.directory.base import Directory, Name
from services.serving.documents import Documents
from services.serving.messages import AnswerPart, DocumentInfo, Passage, UploadAck, check_name, check_request_id
from services.serving.record import Done, Record, digest_of


class Sessions(Catalog):
    """All sessions that are kept in one directory, as one replica serves them.

    tenant: whose session it is; to others it isn't there. request_id: a name of the caller's for the call: made again
    under the same name it isn't carried out twice, but answered alike; asked otherwise, it raises AlreadyExists.
    expected_generation: the only one at which the call is to be carried out; else it raises Conflict. timeout_s: when
    the caller's time is up; what was done stays done.
    """

    def __init__(
        self, model: LoadedModel, engine: Engine, config: ServeConfig, directory: Directory | None = None
    ) -> None:
        super().__init__(model, engine, directory or open_directory(config.sessions, config.encryption_keys), config)
        self._documents = Documents(model, engine, self._lives, config)
        self._answers = Answers(model, engine, self._lives)

    async def open_document(
        self,
        tenant: str,
        session_id: str,
        document_id: str,
        total_bytes: int | None,
        *,
        request_id: str = "",
        expected_generation: int | None = None,
    ) -> UploadAck:
        """Begin a document, or continue the open one; a finished one is acknowledged as finished.

        Raises FailedPrecondition if another one is open, LimitExceeded if it can't fit.
        """
        name = name_of(tenant, session_id)
        check_name("document_id", document_id)
        check_request_id(request_id)
        asked = {"document_id": document_id, "total_bytes": total_bytes, "expected_generation": expected_generation}
        digest = digest_of("open_document", **asked)
        async with self._lives.using(name) as live, self._lives.claimed(live):
            known = live.record.known(request_id, digest) is not None
            self._check(live, None if known else expected_generation)
            return await self._documents.open(live, document_id, total_bytes, request_id, Done(digest=digest))

    async def append(
        self,
        tenant: str,
        session_id: str,
        document_id: str,
        offset: int,
        data: bytes,
        *,
        timeout_s: float | None = None,
    ) -> UploadAck:
        """Take bytes at `offset`, which must be the committed offset; with none, wait for room in the engine.

        The acknowledgement says if there is none yet: it is `waiting`. Raises WrongOffset, InvalidDocument,
        LimitExceeded; then nothing of `data` is taken. DeadlineExceeded, Unavailable: the detail committed_offset says
        what is.
        """
        async with self._lives.using(name_of(tenant, session_id)) as live, self._lives.claimed(live, resident=True):
            self._check(live, None)
            return await self._documents.append(live, document_id, offset, data, timeout_s)

    async def finish(
        self,
        tenant: str,
        session_id: str,
        document_id: str,
        total_bytes: int,
        sha256: bytes,
        *,
        timeout_s: float | None = None,
    ) -> UploadAck:
        """End a document whose size and digest are as given; made again, wait until all of it has been run.

        Until then the acknowledgement says that it is `waiting`, after a slice at most. Raises InvalidDocument; then
        the document stays open.
        """
        async with self._lives.using(name_of(tenant, session_id)) as live, self._lives.claimed(live, resident=True):
            self._check(live, None)
            return await self._documents.finish(live, document_id, total_bytes, sha256, timeout_s)

    async def get_document(self, tenant: str, session_id: str, document_id: str) -> DocumentInfo:
        info = await self.get(tenant, session_id)
        found = next((document for document in info.documents if document.document_id == document_id), None)
        if found is None:
            raise NotFound(f"document {document_id!r} doesn't exist; begin it with a header", document_id=document_id)
        return found

    async def document_bytes(self, tenant: str, session_id: str, document_id: str) -> bytes:
        """What was uploaded of a document. Raises NotFound."""
        name = name_of(tenant, session_id)
        stored = await self._read(name)
        return await self._lives.run(self._documents.bytes_of, name, Record.read(stored.record), document_id)

    async def passages(self, tenant: str, session_id: str) -> list[Passage]:
        """The parts of documents that were last retrieved; none if the session isn't in the engine just now."""
        name = name_of(tenant, session_id)
        stored = await self._read(name)
        live = self._lives.find(name)
        if live is None or not live.resident:
            return []
        record, positions = Record.read(stored.record), await asyncio.to_thread(self._engine.retrieved, live.key)
        return await self._lives.run(self._documents.passages, name, record, positions)

    def room(self, tenant: str, name: str) -> AbstractAsyncContextManager[None]:
        """Room in the engine for a stream that is no session. Raises Busy."""
        return self._lives.residents.room(Name(tenant, name))

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
        slice_s: float | None = None,
        expected_generation: int | None = None,
    ) -> AsyncGenerator[AnswerPart]:
        """Ask, and stream the answer, whose last part has a finish reason.

        With a request_id the answer can be taken up anywhere after a break, or after its end: it goes on after the
        first `after` tokens. slice_s: the stream ends after so long, answer or no; call again. Without a request_id,
        closing the iterator ends the answer. Raises InvalidRequest, FailedPrecondition, LimitExceeded; nothing of the
        question is then in the stream.
        """
        name = name_of(tenant, session_id)
        check_request_id(request_id)
        request = self._answers.request(question, params, request_id, after, expected_generation)
        async with (
            self._lives.using(name) as live,
            aclosing(self._answers.stream(live, request, timeout_s, slice_s)) as parts,
        ):
            async for part in parts:
                yield part

    async def cancel_answer(self, tenant: str, session_id: str, *, request_id: str = "") -> None:
        """End the answer under way, if any; returns when the session takes calls again.

        request_id: of the answer that is meant; "" is any.
        """
        name = name_of(tenant, session_id)
        check_request_id(request_id)
        async with self._lives.using(name) as live:
            await self._answers.cancel(live, request_id)

    async def drain(self) -> None:
        """End all calls at the next step, for other replicas to go on with; take no more."""
        await self._lives.drain()

    def close(self) -> None:
        """Let go of the directory."""
        self._directory.close()
