"""What a directory keeps of a session: a record of where it stands, and a log of what its stream was given.

The log is the truth. Its entries hold tokens, the points at which a pass had to end, and the bytes of documents; from
them any replica makes the session again (`segcore.engine.replay`). The record says what the entries mean.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from segcore.errors import AlreadyExists, FailedPrecondition, InvalidRequest, SessionLost
from segcore.sampling import FinishReason

# How many calls with a request_id a session remembers.
MOST_REQUESTS = 64
# What every encrypted value begins with.
ENCRYPTED = b"segcrypt"
_HEAD = struct.Struct("<IIIi")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DocumentRecord(_Model):
    """held: bytes, the document's last ones, that aren't tokens yet. first_token: where in the stream it begins."""

    id: str
    first_token: int = Field(ge=0)
    committed_offset: int = Field(default=0, ge=0)
    held: int = Field(default=0, ge=0)
    sha256: str | None = None

    @property
    def finished(self) -> bool:
        return self.sha256 is not None


class OpenAnswer(_Model):
    """An answer that has begun. first_token: its place in the stream. first_entry: in the log, where its tokens are."""

    request_id: str
    digest: str
    sampling: dict[str, Any]
    first_token: int
    first_entry: int


class Done(_Model):
    """What a call with a request_id came to. digest: of what was asked. Of an answer, where its tokens are, too."""

    digest: str
    first_token: int = 0
    first_entry: int = 0
    last_entry: int = 0
    answer_tokens: int = 0
    finish_reason: FinishReason | None = None


class Point(_Model):
    """Where the session was quiet, and can go back to: after a document, or an answer."""

    tokens: int
    entries: int
    documents: int
    turn_open: bool
    last_token: int | None


class Record(_Model):
    """Where a session stands. turn_open: a user's turn has begun. last_token: of the last answer.

    fingerprint: of model and configuration. tokens, entries: of stream and log when this was written; tokens of an open
    answer may follow.
    """

    model: str
    fingerprint: dict[str, str | int]
    create_time: float
    ttl_s: float | None
    documents: list[DocumentRecord] = []
    tokens: int = 0
    entries: int = 0
    turn_open: bool = False
    last_token: int | None = None
    answer: OpenAnswer | None = None
    requests: dict[str, Done] = {}
    points: list[Point] = []

    @classmethod
    def read(cls, data: bytes) -> Record:
        """Raises SessionLost, and FailedPrecondition for what is encrypted still."""
        if data.startswith(ENCRYPTED):
            raise FailedPrecondition("the session is encrypted, and this service has no encryption_keys")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise SessionLost(f"the session's record can't be read: {error.errors()[0]['msg']}") from error

    def to_bytes(self) -> bytes:
        return self.model_dump_json().encode()

    @property
    def open_document(self) -> DocumentRecord | None:
        """The document that has begun and not ended, if any; there is at most one, the last."""
        return self.documents[-1] if self.documents and not self.documents[-1].finished else None

    def document(self, document_id: str) -> DocumentRecord | None:
        return next((document for document in self.documents if document.id == document_id), None)

    def known(self, request_id: str, digest: str) -> Done | None:
        """What came of the call with this id; None if there was none. Raises AlreadyExists if that asked otherwise."""
        done = self.requests.get(request_id) if request_id else None
        if done is not None and done.digest != digest:
            raise reused(request_id)
        return done

    def remember(self, request_id: str, done: Done) -> None:
        """Keep what a call with an id came to; the oldest are forgotten."""
        if request_id:
            self.requests[request_id] = done
            for oldest in list(self.requests)[:-MOST_REQUESTS]:
                del self.requests[oldest]

    def point(self) -> None:
        """The session is quiet here."""
        here = Point(
            tokens=self.tokens,
            entries=self.entries,
            documents=len(self.documents),
            turn_open=self.turn_open,
            last_token=self.last_token,
        )
        self.points.append(here)

    def rewind(self, tokens: int) -> Point:
        """Go back to a point, or to 0, and forget what came after. Raises InvalidRequest if there is none there."""
        start = Point(tokens=0, entries=0, documents=0, turn_open=False, last_token=None)
        points = [start, *self.points]
        if tokens not in [point.tokens for point in points]:
            raise InvalidRequest(
                f"a session can go back to the end of a document or an answer: to token"
                f" {', '.join(str(point.tokens) for point in points)}; not to {tokens}",
                field="tokens",
            )
        last = max(i for i, point in enumerate(points) if point.tokens == tokens)
        point, self.points = points[last], points[1 : last + 1]
        self.documents = self.documents[: point.documents]
        self.turn_open, self.last_token = point.turn_open, point.last_token
        self.requests = {id: done for id, done in self.requests.items() if done.last_entry <= point.entries}
        return point


def reused(request_id: str) -> AlreadyExists:
    """What is raised for an id that stands for another call already."""
    return AlreadyExists(
        f"request_id {request_id!r} was used for another call of this session; choose a new one", request_id=request_id
    )


def digest_of(call: str, **body: object) -> str:
    """A hash of what a call asks for."""
    return hashlib.sha256(json.dumps([call, body], sort_keys=True).encode()).hexdigest()[:32]


class Entry(NamedTuple):
    """Something that a stream was given.

    stops: relative to the entry's first token, as `segcore.engine.replay.journal_of` takes them. document: the number
    of the document whose next bytes `data` are; -1 for none.
    """

    tokens: Sequence[int] = ()
    stops: Sequence[int] = ()
    document: int = -1
    data: bytes = b""

    def to_bytes(self) -> bytes:
        head = _HEAD.pack(len(self.tokens), len(self.stops), len(self.data), self.document)
        body = head + array("i", self.tokens).tobytes() + array("i", self.stops).tobytes() + self.data
        return zlib.crc32(body).to_bytes(4, "little") + body

    @classmethod
    def read(cls, data: bytes) -> Entry:
        """Raises SessionLost."""
        if len(data) < 4 + _HEAD.size or zlib.crc32(data[4:]) != int.from_bytes(data[:4], "little"):
            raise SessionLost("an entry of the session's log is damaged: its checksum doesn't match")
        tokens, stops, size, document = _HEAD.unpack_from(data, 4)
        numbers = array("i")
        end = 4 + _HEAD.size + 4 * (tokens + stops)
        if len(data) != end + size:
            raise SessionLost("an entry of the session's log has the wrong length")
        numbers.frombytes(data[4 + _HEAD.size : end])
        return cls(numbers[:tokens], numbers[tokens:], document, data[end:])


class Contents(NamedTuple):
    """A whole log. stops: positions in the stream. digest: of the open document's bytes; held: those not yet tokens."""

    tokens: array[int]
    stops: list[int]
    digest: hashlib._Hash
    held: bytes


def contents(record: Record, entries: Iterable[bytes]) -> Contents:
    """What a log says. Raises SessionLost if it is damaged, or isn't the record's."""
    tokens, stops, count = array("i"), list[int](), 0
    sizes = [0] * len(record.documents)
    digest, held = hashlib.sha256(), b""
    for count, data in enumerate(entries, 1):  # noqa: B007 - counted
        entry = Entry.read(data)
        stops += [len(tokens) + stop if stop >= 0 else stop - len(tokens) for stop in entry.stops]
        tokens.extend(entry.tokens)
        if entry.document >= 0 and entry.document < len(sizes):
            sizes[entry.document] += len(entry.data)
            document = record.documents[entry.document]
            if not document.finished:
                digest.update(entry.data)
                held = (held + entry.data)[-document.held :] if document.held else b""
    if count < record.entries or len(tokens) < record.tokens:
        raise SessionLost(f"of the session's log {count} entries are left, and there were {record.entries}")
    if sizes != [document.committed_offset for document in record.documents]:
        raise SessionLost("the session's log doesn't hold its documents' bytes")
    return Contents(tokens, stops, digest, held)
