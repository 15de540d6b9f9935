"""Between protobuf messages and the plain values the service works with. With the client, the only reader of them."""

from __future__ import annotations

from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from protos.gen.segcore.v1 import segcore_pb2 as pb
from segcore.errors import InvalidRequest
from segcore.sampling import FinishReason, SamplingParams
from services.serving.messages import AnswerPart, DocumentInfo, Progress, SessionInfo, UploadAck

SCHEMA_REVISION = 3

_FINISH: dict[FinishReason, pb.FinishReason] = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
_SAMPLING_FIELDS = ("max_tokens", "temperature", "top_p", "top_k", "seed")


def sampling_from(message: pb.SamplingParams) -> SamplingParams:
    """Raises InvalidRequest for values out of range."""
    given = {name: getattr(message, name) for name in _SAMPLING_FIELDS if message.HasField(name)}
    return SamplingParams(stop=tuple(message.stop), **given)


def sampling_to(params: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(stop=params.stop, **{name: getattr(params, name) for name in _SAMPLING_FIELDS})


def session_to(info: SessionInfo) -> pb.Session:
    created = Timestamp()
    created.FromMilliseconds(int(info.create_time * 1000))
    return pb.Session(
        session_id=info.session_id,
        model=info.model,
        create_time=created,
        processed_tokens=info.processed_tokens,
        pending_tokens=info.pending_tokens,
        segments=info.segments,
        documents=[document_to(document) for document in info.documents],
        generation=info.generation,
        ttl=duration(info.ttl_s),
        points=info.points,
        answering=info.answering,
        unreadable=info.unreadable,
    )


def session_from(message: pb.Session) -> SessionInfo:
    return SessionInfo(
        session_id=message.session_id,
        model=message.model,
        create_time=message.create_time.ToMilliseconds() / 1000,
        processed_tokens=message.processed_tokens,
        pending_tokens=message.pending_tokens,
        segments=message.segments,
        documents=[document_from(document) for document in message.documents],
        generation=message.generation,
        ttl_s=seconds_from(message, "ttl"),
        points=list(message.points),
        answering=message.answering,
        unreadable=message.unreadable,
    )


def document_to(info: DocumentInfo) -> pb.Document:
    return pb.Document(document_id=info.document_id, committed_offset=info.committed_offset, finished=info.finished)


def document_from(message: pb.Document) -> DocumentInfo:
    return DocumentInfo(
        document_id=message.document_id, committed_offset=message.committed_offset, finished=message.finished
    )


_PROGRESS_FIELDS = (
    "processed_tokens",
    "pending_tokens",
    "segments",
    "engine_bytes",
    "past_host_bytes",
    "past_disk_bytes",
)


def ack_to(ack: UploadAck, window_bytes: int) -> pb.UploadDocumentResponse:
    return pb.UploadDocumentResponse(
        committed_offset=ack.committed_offset,
        window_bytes=window_bytes,
        progress=pb.Progress(**{name: getattr(ack.progress, name) for name in _PROGRESS_FIELDS}),
        finished=ack.finished,
        generation=ack.generation,
    )


def ack_from(message: pb.UploadDocumentResponse) -> UploadAck:
    progress = Progress(**{name: getattr(message.progress, name) for name in _PROGRESS_FIELDS})
    return UploadAck(
        committed_offset=message.committed_offset,
        progress=progress,
        finished=message.finished,
        generation=message.generation,
    )


def answer_to(part: AnswerPart) -> pb.GenerateResponse:
    message = pb.GenerateResponse(text=part.text, token_index=part.token_index, generation=part.generation)
    if part.finish_reason is not None:
        message.finish_reason = _FINISH.get(part.finish_reason, pb.FINISH_REASON_UNSPECIFIED)
        message.usage.CopyFrom(pb.Usage(prompt_tokens=part.prompt_tokens, answer_tokens=part.answer_tokens))
    return message


def answer_from(message: pb.GenerateResponse) -> AnswerPart:
    reasons = {value: name for name, value in _FINISH.items()}
    return AnswerPart(
        text=message.text,
        token_index=message.token_index,
        finish_reason=reasons.get(message.finish_reason),
        prompt_tokens=message.usage.prompt_tokens,
        answer_tokens=message.usage.answer_tokens,
        generation=message.generation,
    )


def options_from(message: Any) -> dict[str, Any]:
    """What a request says of its own carrying out: expected_generation and, if it has one, request_id."""
    known = message.HasField("expected_generation")
    options = {"expected_generation": message.expected_generation if known else None}
    return options | ({"request_id": message.request_id} if hasattr(message, "request_id") else {})


def duration(seconds: float | None) -> Duration | None:
    return None if seconds is None else Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def seconds_from(message: Any, field: str) -> float | None:
    """A duration, if it is set. Raises InvalidRequest for a negative one, or one of centuries."""
    if not message.HasField(field):
        return None
    value = getattr(message, field)
    seconds: float = value.seconds + value.nanos / 1e9
    if not 0 <= seconds < 1e10:
        raise InvalidRequest(f"{field} must be a time from 0 on", field=field)
    return seconds
