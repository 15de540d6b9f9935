"""A document on its way to the service: in windows, from the committed offset on, as often as it takes."""

from __future__ import annotations

import asyncio
import hashlib
import io
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import grpc

from protos.gen.segcore.v1 import segcore_pb2 as pb
from segcore.errors import AlreadyExists, DeadlineExceeded, FailedPrecondition, SegcoreError, Unavailable
from services.serving import codec
from services.serving.client.retries import Deadline, Patience, ended_early
from services.serving.messages import UploadAck

Source = Path | bytes | str | BinaryIO
OnProgress = Callable[[UploadAck], None]


class Upload:
    """One document on its way. Bytes are kept until they are committed, so that any source can be taken up again."""

    def __init__(
        self,
        open_call: Callable[[str], Any],
        session_id: str,
        document_id: str,
        file: BinaryIO,
        on_progress: OnProgress,
        deadline: Deadline,
        expected_generation: int | None,
    ) -> None:
        """open_call: begins a bidirectional call for a session."""
        self._deadline, self._expected = deadline, dict[str, Any]()
        if expected_generation is not None:  # under an id, since the answer to a header may be lost
            self._expected = {"expected_generation": expected_generation, "request_id": uuid.uuid4().hex}
        self._open_call, self._session_id, self._document_id = open_call, session_id, document_id
        self._file, self._on_progress = file, on_progress
        self._digest = hashlib.sha256()
        self._kept = bytearray()  # bytes [committed, read) of the document
        self._committed = 0
        self._window = 0
        self._read_all = False
        self._sent_finish = False
        self._acknowledged = asyncio.Event()

    async def run(self) -> UploadAck:
        """Until all of it has been run. Raises SegcoreError; those of lack of time say what is committed."""
        try:
            async with asyncio.timeout(self._deadline.wait_s) as limit:
                return await self._attempts()
        except TimeoutError:
            if not limit.expired():  # the source's own
                raise
            raise self._deadline.over(document_id=self._document_id, committed_offset=self._committed) from None
        except (DeadlineExceeded, Unavailable) as error:
            known = {"document_id": self._document_id, "committed_offset": str(self._committed)}
            error.details = known | error.details
            raise

    async def _attempts(self) -> UploadAck:
        patience = Patience(self._deadline)
        while True:
            before = self._committed
            try:
                return await self._attempt()
            except SegcoreError as error:
                if self._committed > before:  # it went on meanwhile: a new fault, with patience of its own
                    patience = Patience(self._deadline)
                await patience.wait(error)

    async def _attempt(self) -> UploadAck:
        call = self._open_call(self._session_id)
        acks: asyncio.Task[UploadAck] | None = None
        try:
            await call.write(pb.UploadDocumentRequest(header=self._header()))
            ack = await self._take_ack(call)
            self._expected = {}  # from here on the generations are our own
            if ack.finished:  # ours, and only the answer to its finish was lost
                return ack
            acks = asyncio.create_task(self._take_acks(call))
            await self._send(call, acks)
            return await acks
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # A write that fails says little; the status with which the call ended says why.
            raise await ended_early(call) from None
        finally:
            call.cancel()
            if acks is not None:
                acks.cancel()
                await asyncio.gather(acks, return_exceptions=True)

    def _header(self) -> pb.DocumentHeader:
        return pb.DocumentHeader(
            session_id=self._session_id,
            document_id=self._document_id,
            timeout=codec.duration(self._deadline.left_s),
            **self._expected,
        )

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
        if not self._read_all:
            data = await asyncio.to_thread(self._file.read, size)
            self._read_all = not data
            self._digest.update(data)
            self._kept += data

    async def _read_to(self, offset: int) -> None:
        """Catch up with a document that an earlier client began: its bytes count for the digest only."""
        while self._committed + len(self._kept) < offset and not self._read_all:
            await self._read(offset - self._committed - len(self._kept))

    async def _take_ack(self, call: Any) -> UploadAck:
        response = await call.read()
        if response is grpc.aio.EOF:
            raise await ended_early(call)
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


@contextmanager
def reading(source: Source) -> Iterator[BinaryIO]:
    """Any source as a binary file; only one that is opened here is closed."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            yield file
    elif isinstance(source, (bytes, str)):
        yield io.BytesIO(source.encode() if isinstance(source, str) else source)
    else:
        yield source
