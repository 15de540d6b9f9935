"""The plain values that cross the service's tiers, and that clients get."""

from __future__ import annotations

import hashlib
import re
import uuid
from dataclasses import dataclass, field

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
    """generation: how many writes there were. points: positions in the stream, in tokens, to which it can be rewound.

    Of a session that no replica works on, all tokens count as processed. unreadable: in a list, why nothing but the
    name is known.
    """

    session_id: str
    model: str = ""
    create_time: float = 0.0
    processed_tokens: int = 0
    pending_tokens: int = 0
    segments: int = 0
    documents: list[DocumentInfo] = field(default_factory=list)
    generation: int = 0
    ttl_s: float | None = None
    points: list[int] = field(default_factory=list)
    answering: bool = False
    unreadable: str = ""


@dataclass(frozen=True, kw_only=True)
class SessionPage:
    """Some of a tenant's sessions, in the order of their ids; next_page_token: for the next, "" if there are none."""

    sessions: list[SessionInfo]
    next_page_token: str = ""


@dataclass(frozen=True, kw_only=True)
class UploadAck:
    """Everything below `committed_offset` is taken. generation: the session's.

    waiting: the engine hasn't come so far yet as the caller is to wait for: make the call again, with no new bytes.
    input_tokens: those that the call's bytes became; it is told at once, for the caller may not wait.
    """

    committed_offset: int
    progress: Progress
    finished: bool = False
    generation: int = 0
    waiting: bool = False
    input_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A part of a document, in bytes of its UTF-8 [start, end), and of how many tokens it was made."""

    document_id: str
    start_byte: int
    end_byte: int
    tokens: int


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
    """Some text of an answer; the last part has a finish reason, the counts of tokens, and the session's generation.

    token_index: how many of the answer's tokens all text so far stands for: where to go on after a break.
    logprobs: of the tokens since the part before, if asked for. input_tokens: of the question, with the first part that
    anybody gets; of a prompt, in an empty part before it is run.
    """

    text: str
    token_index: int = 0
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    generation: int = 0
    input_tokens: int = 0


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


def session_id_for(request_id: str) -> str:
    """The id that a call which makes a session gives it, if the caller names none: the same for the same request."""
    return hashlib.sha256(request_id.encode()).hexdigest()[:32] if request_id else uuid.uuid4().hex


def check_tenant(tenant: str) -> None:
    """Raise InvalidRequest unless `tenant` can be one's name; "" is nobody's."""
    if tenant:
        check_name("tenant", tenant)


def check_request_id(request_id: str) -> None:
    """Raise InvalidRequest unless it is empty, or can name a request."""
    if request_id:
        check_name("request_id", request_id)


def check_name(name: str, value: str) -> None:
    """Raise InvalidRequest unless `value` can name a session or document."""
    if not _NAME.fullmatch(value):
        raise InvalidRequest(f"{name}={value[:80]!r} must be 1 to 64 letters, digits, '-' or '_'", field=name)
