"""Sessions as clients see them: documents of bytes, questions and answers of text. Knows no Ray and no gRPC.

One asyncio loop drives it; the engine works on its own thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from segcore.engine.engine import Engine
from segcore.errors import (
    FailedPrecondition,
    InvalidDocument,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    SegcoreError,
    WrongOffset,
)
from segcore.sampling import SamplingParams
from segcore.text import DocumentEncoder, check_question
from segcore.weights import LoadedModel
from services.serving.answer import Answer
from services.serving.config import ServeConfig
from services.serving.messages import AnswerPart, DocumentInfo, Progress, SessionInfo, UploadAck, check_name

MAX_QUESTION_CHARS = 100_000


@dataclass
class _Document:
    id: str
    encoder: DocumentEncoder
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    finished: bool = False

    @property
    def committed_offset(self) -> int:
        return self.encoder.bytes_taken

    @property
    def info(self) -> DocumentInfo:
        return DocumentInfo(document_id=self.id, committed_offset=self.committed_offset, finished=self.finished)


@dataclass
class _Session:
    """started: the stream holds tokens. turn_open: a user's turn has begun. last_token: the last answer's last token.

    key: its name in the engine. lock: one writer at a time.
    """

    id: str
    key: str
    create_time: float = field(default_factory=time.time)
    documents: dict[str, _Document] = field(default_factory=dict)
    started: bool = False
    turn_open: bool = False
    last_token: int | None = None
    answer: Answer | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Sessions:
    """All sessions of one engine."""

    def __init__(self, model: LoadedModel, engine: Engine, config: ServeConfig) -> None:
        self._model, self._engine, self._config = model, engine, config
        self._sessions: dict[str, _Session] = {}

    async def create(self, tenant: str, session_id: str, model: str) -> SessionInfo:
        """Begin an empty session. Raises InvalidRequest, NotFound (model), AlreadyExists, Busy."""
        check_name("session_id", session_id)
        if model and model != self._model.name:
            raise NotFound(f"model {model!r} isn't served here; this service runs {self._model.name!r}", model=model)
        key = _key(tenant, session_id)
        self._engine.open(key, tenant=tenant)
        self._sessions[key] = _Session(session_id, key)
        return await self.get(tenant, session_id)

    async def get(self, tenant: str, session_id: str) -> SessionInfo:
        session = self._find(tenant, session_id)
        stats = self._engine.session_stats(session.key)
        return SessionInfo(
            session_id=session_id,
            model=self._model.name,
            create_time=session.create_time,
            processed_tokens=stats.tokens,
            pending_tokens=stats.pending_tokens,
            segments=stats.segments,
            documents=[document.info for document in session.documents.values()],
        )

    async def delete(self, tenant: str, session_id: str) -> None:
        session = self._find(tenant, session_id)
        # The engine ends the step it is in first, which may take as long as a chunk.
        await asyncio.to_thread(self._engine.close, session.key)
        del self._sessions[session.key]

    async def open_document(self, tenant: str, session_id: str, document_id: str, total_bytes: int | None) -> UploadAck:
        """Begin a document, or continue the open one; a finished one is acknowledged as finished.

        Raises FailedPrecondition if another one is open, LimitExceeded if it can't fit.
        """
        check_name("document_id", document_id)
        session = self._find(tenant, session_id)
        self._check_idle(session)
        limit = self._config.max_document_bytes
        if total_bytes is not None and not 0 <= total_bytes <= limit:
            raise self._too_long(limit)
        document = session.documents.get(document_id)
        if document is None:
            self._check_none_open(session)
            document = session.documents[document_id] = _Document(document_id, DocumentEncoder(self._model.tokenizer))
        return self._ack(session, document, finished=document.finished)

    async def append(self, tenant: str, session_id: str, document_id: str, offset: int, data: bytes) -> UploadAck:
        """Take bytes at `offset`, which must be the committed offset; returns when the engine has room for more.

        Raises WrongOffset, InvalidDocument, LimitExceeded; then nothing of `data` is taken.
        """
        session = self._find(tenant, session_id)
        async with session.lock:
            self._check_idle(session)
            document = self._open_document(session, document_id)
            if offset != document.committed_offset:
                raise WrongOffset(
                    f"data begin at byte {offset}, but {document.committed_offset} bytes are committed; continue there",
                    committed_offset=document.committed_offset,
                )
            if len(data) > self._config.max_data_bytes:
                raise InvalidRequest(
                    f"a message of {len(data)} bytes is over max_data_bytes={self._config.max_data_bytes}; send less",
                    field="data",
                )
            if offset + len(data) > self._config.max_document_bytes:
                raise self._too_long(self._config.max_document_bytes)
            encoder = document.encoder.fork()
            tokens = await asyncio.to_thread(encoder.feed, data)
            opening = self._opening(session, document)
            # What the encoder holds back must fit too, or the document could never be finished.
            self._check_room(session.key, len(opening) + len(tokens) + encoder.most_tokens_held)
            self._engine.append(session.key, opening + tokens)
            document.encoder = encoder
            document.digest.update(data)
            session.started = session.turn_open = True
            await asyncio.wrap_future(self._engine.room(session.key))
            return self._ack(session, document)

    async def finish(
        self, tenant: str, session_id: str, document_id: str, total_bytes: int, sha256: bytes
    ) -> UploadAck:
        """End a document whose size and digest are as given; returns when all of it has been run.

        Raises InvalidDocument; then the document stays open.
        """
        session = self._find(tenant, session_id)
        async with session.lock:
            self._check_idle(session)
            document = self._open_document(session, document_id)
            if document.committed_offset == 0:
                del session.documents[document_id]
                raise InvalidDocument("the document is empty")
            if total_bytes != document.committed_offset:
                raise WrongOffset(
                    f"the document is said to have {total_bytes} bytes, and {document.committed_offset} came",
                    committed_offset=document.committed_offset,
                )
            if sha256 != document.digest.digest():
                raise InvalidDocument(
                    "the document's SHA-256 isn't that of the bytes that came; delete the session and upload again",
                    received_sha256=document.digest.hexdigest(),
                )
            self._engine.append(session.key, document.encoder.fork().finish())
            document.finished = True
            await asyncio.wrap_future(self._engine.flush(session.key))
            return self._ack(session, document, finished=True)

    async def get_document(self, tenant: str, session_id: str, document_id: str) -> DocumentInfo:
        return self._document(self._find(tenant, session_id), document_id).info

    async def generate(
        self, tenant: str, session_id: str, question: str, params: SamplingParams
    ) -> AsyncIterator[AnswerPart]:
        """Ask, and stream the answer. Closing the iterator ends the answer where it is.

        Raises InvalidRequest, FailedPrecondition, LimitExceeded; nothing of the question is then in the stream.
        """
        check_question(question)
        if len(question) > MAX_QUESTION_CHARS:
            raise InvalidRequest(
                f"the question is longer than {MAX_QUESTION_CHARS} characters; upload it as a document",
                field="question",
            )
        session = self._find(tenant, session_id)
        async with session.lock:
            self._check_idle(session)
            self._check_none_open(session)
            prompt_tokens = self._ask(session, question)
            answer = Answer(self._model, params)
            session.answer = answer
            self._engine.generate(session.key, answer.generation)
        answer.generation.done.add_done_callback(answer.on_loop(lambda: self._end_answer(session, answer)))
        try:
            async for part in answer.parts(prompt_tokens):
                yield part
        finally:
            self._engine.abort(answer.generation)

    async def cancel_answer(self, tenant: str, session_id: str) -> None:
        """End the answer under way, if any; returns when the session takes calls again."""
        answer = self._find(tenant, session_id).answer
        if answer is not None:
            self._engine.abort(answer.generation)
            await asyncio.wait([asyncio.wrap_future(answer.generation.done)])

    def _ask(self, session: _Session, question: str) -> int:
        """Put a question and its turn mark into the stream; returns the stream's length after it."""
        chat, tokenizer = self._model.chat, self._model.tokenizer
        text = tokenizer.encode_continuation(question) if session.turn_open else tokenizer.encode(question)
        before, after = chat.prompt_tail(self._opening(session) + text)
        length = self._check_room(session.key, len(before) + len(after) + 1) - 1
        self._engine.append(session.key, before)
        self._engine.mark(session.key)
        self._engine.append(session.key, after)
        session.started, session.turn_open = True, False
        return length

    def _check_room(self, key: str, tokens: int) -> int:
        """The stream's length with so many more tokens. Raises LimitExceeded if that is too long."""
        stats, limit = self._engine.session_stats(key), self._engine.max_stream_tokens
        length = stats.tokens + stats.pending_tokens + tokens
        if length > limit:
            raise LimitExceeded(f"the stream would be longer than {limit} tokens", max_tokens=limit)
        return length

    def _opening(self, session: _Session, document: _Document | None = None) -> list[int]:
        """The tokens before a text: those that open a user's turn, or that part it from the text before."""
        if document is not None and document.committed_offset:
            return []
        chat = self._model.chat
        if session.turn_open:
            return chat.separator
        return chat.reopen(session.last_token) if session.started else chat.head

    def _end_answer(self, session: _Session, answer: Answer) -> None:
        session.answer = None
        session.last_token = answer.last_token

    def _find(self, tenant: str, session_id: str) -> _Session:
        session = self._sessions.get(_key(tenant, session_id))
        if session is None:
            raise NotFound(f"session {session_id!r} doesn't exist; create it first", session_id=session_id)
        return session

    def _check_idle(self, session: _Session) -> None:
        if session.answer is not None:
            raise FailedPrecondition(f"session {session.id!r} is answering; wait for the answer's end, or cancel it")

    def _document(self, session: _Session, document_id: str) -> _Document:
        if document_id not in session.documents:
            raise NotFound(f"document {document_id!r} doesn't exist; begin it with a header", document_id=document_id)
        return session.documents[document_id]

    def _open_document(self, session: _Session, document_id: str) -> _Document:
        document = self._document(session, document_id)
        if document.finished:
            raise FailedPrecondition(f"document {document_id!r} is already finished")
        return document

    def _check_none_open(self, session: _Session) -> None:
        """Raise FailedPrecondition if a document has begun and not ended; forget one that got no byte."""
        for document in list(session.documents.values()):
            if document.finished:
                continue
            if document.committed_offset:
                raise FailedPrecondition(
                    f"document {document.id!r} is still open at byte {document.committed_offset}; finish it first",
                    document_id=document.id,
                    committed_offset=document.committed_offset,
                )
            del session.documents[document.id]

    def _too_long(self, limit: int) -> SegcoreError:
        return LimitExceeded(f"a document may have at most {limit} bytes here", max_document_bytes=limit)

    def _ack(self, session: _Session, document: _Document, *, finished: bool = False) -> UploadAck:
        stats, engine = self._engine.session_stats(session.key), self._engine.stats()
        progress = Progress(
            processed_tokens=stats.tokens,
            pending_tokens=stats.pending_tokens,
            segments=stats.segments,
            engine_bytes=engine.engine_bytes,
            past_host_bytes=engine.past_bytes["host"],
            past_disk_bytes=engine.past_bytes.get("disk", 0),
        )
        return UploadAck(committed_offset=document.committed_offset, progress=progress, finished=finished)


def _key(tenant: str, session_id: str) -> str:
    """A session's name in the engine."""
    return f"{tenant}/{session_id}"
