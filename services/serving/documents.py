"""Documents on their way into a session: bytes at an offset, which become tokens as soon as they are certain."""

from __future__ import annotations

import asyncio
import hashlib
import time
from concurrent.futures import Future

from segcore.engine.engine import Engine
from segcore.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidDocument,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    SegcoreError,
    Unavailable,
    WrongOffset,
)
from segcore.text import DocumentEncoder
from segcore.weights import LoadedModel
from services.serving.config import ServeConfig
from services.serving.directory.base import Name
from services.serving.live import Live
from services.serving.lives import Lives
from services.serving.messages import Passage, Progress, UploadAck
from services.serving.passages import Placed, passages
from services.serving.record import DocumentRecord, Done, Entry, Record


class Documents:
    """What `Sessions` does with documents; the session is claimed, and from `append` on resident."""

    def __init__(self, model: LoadedModel, engine: Engine, lives: Lives, config: ServeConfig) -> None:
        self._model, self._engine, self._lives, self._config = model, engine, lives, config

    async def open(
        self, live: Live, document_id: str, total_bytes: int | None, request_id: str, done: Done
    ) -> UploadAck:
        """done: what is remembered of the call that begins a document."""
        limit = self._config.max_document_bytes
        if total_bytes is not None and not 0 <= total_bytes <= limit:
            raise self._too_long(limit)
        document = live.record.document(document_id)
        if document is None:
            check_none_open(live.record)
            document = DocumentRecord(id=document_id, first_token=live.tokens)
            live.record.documents.append(document)
            live.encoder, live.digest = DocumentEncoder(self._model.tokenizer), hashlib.sha256()
            live.record.remember(request_id, done)
            await self._lives.commit(live)
        return self._ack(live, document, finished=document.finished)

    async def append(
        self, live: Live, document_id: str, offset: int, data: bytes, timeout_s: float | None
    ) -> UploadAck:
        began, document = time.monotonic(), _open(live.record, document_id)
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
        if data:
            tokens = await self._take(live, document, data)
            return self._ack(live, document, waiting=not self._engine.room(live.key).done(), input_tokens=tokens)
        waiting = await self._wait(live, document, self._engine.room(live.key), began, timeout_s)
        return self._ack(live, document, waiting=waiting)

    async def finish(
        self, live: Live, document_id: str, total_bytes: int, sha256: bytes, timeout_s: float | None
    ) -> UploadAck:
        began, document = time.monotonic(), live.record.document(document_id)
        again = (
            document is not None
            and document.finished
            and (document.committed_offset, document.sha256) == (total_bytes, sha256.hex())
        )
        if document is None or not again:
            document = _open(live.record, document_id)
            tokens = await self._end(live, document, total_bytes, sha256)
            return self._ack(live, document, waiting=True, input_tokens=tokens)
        waiting = await self._wait(live, document, self._engine.flush(live.key), began, timeout_s)
        return self._ack(live, document, finished=not waiting, waiting=waiting)

    def bytes_of(self, name: Name, record: Record, document_id: str) -> bytes:
        """What the log has of a document. Raises NotFound."""
        number = next((i for i, document in enumerate(record.documents) if document.id == document_id), None)
        if number is None:
            raise _no_document(document_id)
        entries = (Entry.read(data) for data in self._lives.directory.log(name))
        return b"".join(entry.data for entry in entries if entry.document == number)

    def passages(self, name: Name, record: Record, positions: list[int]) -> list[Passage]:
        """The parts of documents that tokens at these positions of the stream were made of."""
        placed = (
            Placed(document.id, document.first_token, self.bytes_of(name, record, document.id).decode(errors="ignore"))
            for document in record.documents
        )
        return passages(self._model.tokenizer, placed, positions)

    async def _take(self, live: Live, document: DocumentRecord, data: bytes) -> int:
        """Returns how many tokens became certain."""
        assert live.encoder is not None
        encoder = live.encoder.fork()
        tokens = await asyncio.to_thread(encoder.feed, data)
        record = live.record
        opening = opening_tokens(self._model, live) if document.committed_offset == 0 else []
        # What the encoder holds back must fit too, or the document could never be finished.
        check_room(self._engine, live, len(opening) + len(tokens) + encoder.most_tokens_held)
        entry = Entry(tokens=opening + tokens, document=record.documents.index(document), data=data)
        document.committed_offset, document.held = encoder.bytes_taken, encoder.bytes_held
        record.turn_open = True
        live.encoder = encoder
        live.digest.update(data)
        await self._lives.commit(live, entry)
        self._engine.append(live.key, entry.tokens)
        return len(entry.tokens)

    async def _end(self, live: Live, document: DocumentRecord, total_bytes: int, sha256: bytes) -> int:
        """Returns how many tokens are its last."""
        if document.committed_offset == 0:
            live.record.documents.remove(document)
            await self._lives.commit(live)
            raise InvalidDocument("the document is empty")
        if total_bytes != document.committed_offset:
            raise WrongOffset(
                f"the document is said to have {total_bytes} bytes, and {document.committed_offset} came",
                committed_offset=document.committed_offset,
            )
        if sha256 != live.digest.digest():
            raise InvalidDocument(
                "the document's SHA-256 isn't that of the bytes that came; delete the session and upload again",
                received_sha256=live.digest.hexdigest(),
            )
        assert live.encoder is not None
        tokens = live.encoder.fork().finish()
        record = live.record
        document.sha256, document.held = sha256.hex(), 0
        record.tokens, record.entries = live.tokens + len(tokens), live.entries + 1
        record.point()
        await self._lives.commit(live, Entry(tokens=tokens, stops=[len(tokens)]))
        self._engine.append(live.key, tokens)
        live.encoder = None
        return len(tokens)

    async def _wait(
        self, live: Live, document: DocumentRecord, work: Future[None], began: float, timeout_s: float | None
    ) -> bool:
        """Wait for the engine, a slice at most; whether it isn't there yet.

        Who leaves, or has no time left, gives up the engine's slot; the tokens are kept.
        """
        slice_s = self._config.slice_s
        left = slice_s if timeout_s is None else min(slice_s, began + timeout_s - time.monotonic())
        try:
            await live.done(work, max(left, 0))
        except TimeoutError:
            if left == slice_s:
                return True
            await self._lives.residents.let_go(live)
            raise DeadlineExceeded(
                f"the time of {timeout_s} s is up; {document.committed_offset} bytes are committed",
                committed_offset=document.committed_offset,
            ) from None
        except asyncio.CancelledError:
            await self._lives.residents.let_go(live)
            raise
        except Unavailable as error:
            error.details["committed_offset"] = str(document.committed_offset)
            raise
        return False

    def _ack(
        self,
        live: Live,
        document: DocumentRecord,
        *,
        finished: bool = False,
        waiting: bool = False,
        input_tokens: int = 0,
    ) -> UploadAck:
        engine, tokens, pending = self._engine.stats(), live.tokens, 0
        if live.resident:
            stats = self._engine.session_stats(live.key)
            tokens, pending = stats.tokens, stats.pending_tokens
        progress = Progress(
            processed_tokens=tokens,
            pending_tokens=pending,
            segments=tokens // self._engine.config.segment.segment_tokens,
            engine_bytes=engine.engine_bytes,
            past_host_bytes=engine.past_bytes["host"],
            past_disk_bytes=engine.past_bytes.get("disk", 0),
        )
        return UploadAck(
            committed_offset=document.committed_offset,
            progress=progress,
            finished=finished,
            generation=live.generation,
            waiting=waiting,
            input_tokens=input_tokens,
        )

    def _too_long(self, limit: int) -> SegcoreError:
        return LimitExceeded(f"a document may have at most {limit} bytes here", max_document_bytes=limit)


def opening_tokens(model: LoadedModel, live: Live) -> list[int]:
    """The tokens before a text: those that open a user's turn, or that part it from the text before."""
    if live.record.turn_open:
        return model.chat.separator
    return model.chat.reopen(live.record.last_token) if live.tokens else model.chat.head


def check_room(engine: Engine, live: Live, tokens: int) -> int:
    """The stream's length with so many more tokens. Raises LimitExceeded if that is too long."""
    length, limit = live.tokens + tokens, engine.max_stream_tokens
    if length > limit:
        raise LimitExceeded(f"the stream would be longer than {limit} tokens", max_tokens=limit)
    return length


def check_none_open(record: Record) -> None:
    """Raise FailedPrecondition if a document has begun and not ended; forget one that got no byte."""
    document = record.open_document
    if document is None:
        return
    if document.committed_offset:
        raise FailedPrecondition(
            f"document {document.id!r} is still open at byte {document.committed_offset}; finish it first",
            document_id=document.id,
            committed_offset=document.committed_offset,
        )
    record.documents.remove(document)


def _open(record: Record, document_id: str) -> DocumentRecord:
    document = record.document(document_id)
    if document is None:
        raise _no_document(document_id)
    if document.finished:
        raise FailedPrecondition(f"document {document_id!r} is already finished")
    return document


def _no_document(document_id: str) -> NotFound:
    return NotFound(f"document {document_id!r} doesn't exist; begin it with a header", document_id=document_id)
