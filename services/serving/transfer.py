"""A whole session as bytes: what its directory keeps, and a hash over all of it."""

from __future__ import annotations

import hashlib
import time

from segcore.errors import InvalidRequest, SegcoreError
from services.serving.record import Record, contents

_MAGIC = b"segcore session 1\n"


def export_bytes(record: Record, log: list[bytes]) -> bytes:
    """Record and log, each part with its length before it; at the end their SHA-256."""
    parts = [record.to_bytes(), *log]
    data = _MAGIC + b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return data + hashlib.sha256(data).digest()


def import_bytes(data: bytes, vocabulary: int) -> tuple[Record, list[bytes]]:
    """What `export_bytes` was given, as a new session's. Raises InvalidRequest for bytes that it can't have made."""
    if not data.startswith(_MAGIC) or hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise InvalidRequest("these bytes aren't an exported session, or are damaged", field="data")
    parts, at, end = list[bytes](), len(_MAGIC), len(data) - 32
    while at < end:
        start = at + 8
        at = start + int.from_bytes(data[at:start], "little")
        parts.append(data[start:at])
    try:
        record = Record.read(parts[0] if at == end else b"")
        found = contents(record, parts[1:])
    except SegcoreError as error:
        raise InvalidRequest(f"the exported session doesn't hold together: {error.message}", field="data") from error
    stops = [stop if stop >= 0 else ~stop for stop in found.stops]
    tokens = found.tokens
    if (
        record.answer is not None
        or (len(tokens), len(parts) - 1) != (record.tokens, record.entries)
        or (tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary)
        or stops != sorted(stops)
        or any(stop > len(tokens) for stop in stops)
    ):
        raise InvalidRequest("the exported session doesn't hold together", field="data")
    record.create_time, record.requests = time.time(), {}
    return record, parts[1:]
