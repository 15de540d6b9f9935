"""The plain values that cross the service's tiers, and that clients get."""

from __future__ import annotations

import re
from dataclasses import dataclass

from segcore.errors import InvalidRequest
from segcore.sampling import FinishReason

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What streaming costs, as it goes; bytes are the whole engine's."""

    processed_tokens: int
    pending_tokens: int
    segments: int
    engine_bytes: int
    past_host_bytes: int
    past_disk_bytes: int


@dataclass(frozen=True, kw_only=True)
class DocumentInfo:
    document_id: str
    committed_offset: int
    finished: bool


@dataclass(frozen=True, kw_only=True)
class SessionInfo:
    session_id: str
    model: str
    create_time: float
    processed_tokens: int
    pending_tokens: int
    segments: int
    documents: list[DocumentInfo]


@dataclass(frozen=True, kw_only=True)
class UploadAck:
    """Everything below `committed_offset` is taken."""

    committed_offset: int
    progress: Progress
    finished: bool = False


# What an answer is asked of, apart from sessions: a text as it is, tokens, or messages of a chat, (role, content).
Prompt = str | list[int] | list[tuple[str, str]]


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer as text, its natural log-probability, and the likeliest ones there."""

    text: str
    logprob: float
    likeliest: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class AnswerPart:
    """Some text of an answer; the last part has a finish reason and the counts of tokens.

    logprobs: of the tokens since the part before, if asked for.
    """

    text: str
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """What a service runs and accepts; see GetServerInfoResponse."""

    version: str
    model: str
    architecture: str
    policy: str
    segment_tokens: int
    max_sessions: int
    max_session_tokens: int
    max_document_bytes: int
    max_data_bytes: int
    window_bytes: int
    past_bytes_per_token: int


def check_name(name: str, value: str) -> None:
    """Raise InvalidRequest unless `value` can name a session or document."""
    if not _NAME.fullmatch(value):
        raise InvalidRequest(f"{name}={value[:80]!r} must be 1 to 64 letters, digits, '-' or '_'", field=name)
