"""The OpenAI-compatible face: its requests, answers and errors, as far as this service can honour them.

An option that would have no effect is refused rather than ignored. Two extensions: with `session_id` the messages, a
user's only, go on with that session's stream; without it a request stands for itself. With `request_id` a request that
is made again is answered alike. It isn't a header, for proxies and tracers choose X-Request-Id.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from segcore.errors import InvalidRequest, NotFound, SegcoreError
from segcore.sampling import MAX_LOGPROBS, MAX_SEED, SamplingParams
from services.config_file import describe
from services.serving.engines import as_segcore_error
from services.serving.gate import Gate
from services.serving.messages import AnswerPart, TokenLogprob
from services.serving.tenants import Tenant
from services.serving.weberror import body_of, read_body

_FINISH = {"stop": "stop", "length": "length", "aborted": "stop"}
_DEFAULT_CHAT_TOKENS = 4096

Text = Annotated[str, StringConstraints(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[_Part], Field(min_length=1)]
    name: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class _ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]


class _Common(BaseModel):
    """What both endpoints take. Options with one value only are those of which no other can be honoured."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: str | None = None
    session_id: str | None = None
    request_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: None = None

    @property
    @abstractmethod
    def wanted_logprobs(self) -> int | None: ...

    def sampling(self, default_tokens: int) -> SamplingParams:
        """Raises InvalidRequest. Defaults are the API's: temperature 1, and another seed for each request."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=self.max_tokens or default_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=self._own_seed() if self.seed is None else self.seed % MAX_SEED,
            stop=tuple(stop),
            logprobs=self.wanted_logprobs,
        )

    def _own_seed(self) -> int:
        if self.request_id is None:
            return secrets.randbelow(MAX_SEED)
        return int.from_bytes(hashlib.sha256(self.request_id.encode()).digest()[:8], "big") % MAX_SEED


class ChatRequest(_Common):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: _ResponseFormat | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", field="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompt(self) -> list[tuple[str, str]]:
        return [("system" if m.role == "developer" else m.role, m.text) for m in self.messages]


class CompletionRequest(_Common):
    prompt: Text | Annotated[list[int], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


async def models(request: Request, gate: Gate, tenant: Tenant) -> Response:
    return JSONResponse({"object": "list", "data": [_model((await gate.engines.info()).model)]})


async def model(request: Request, gate: Gate, tenant: Tenant) -> Response:
    return JSONResponse(_model(await _served(gate, request.path_params["model"])))


async def chat_completions(request: Request, gate: Gate, tenant: Tenant) -> Response:
    asked = await _read(request, gate, ChatRequest)
    if asked.max_completion_tokens is not None:
        if asked.max_tokens is not None:
            raise InvalidRequest("max_tokens is max_completion_tokens' old name; send one", field="max_tokens")
        asked.max_tokens = asked.max_completion_tokens
    params = asked.sampling(_DEFAULT_CHAT_TOKENS)
    if asked.session_id is None:
        parts = gate.complete(tenant, asked.prompt(), params, asked.request_id or "")
    else:
        if params.logprobs is not None:
            raise InvalidRequest("a session's answers come without log-probabilities", field="logprobs")
        question, request_id = _session_question(asked.prompt()), asked.request_id or ""
        parts = gate.answer(tenant, asked.session_id, question, params, request_id=request_id)
    return await _respond(_Chat(await _served(gate, asked.model), asked.request_id), parts, asked)


async def completions(request: Request, gate: Gate, tenant: Tenant) -> Response:
    asked = await _read(request, gate, CompletionRequest)
    if asked.session_id is not None:
        raise InvalidRequest("a session holds a conversation: ask it with /v1/chat/completions", field="session_id")
    parts = gate.complete(tenant, asked.prompt, asked.sampling(default_tokens=16), asked.request_id or "")
    return await _respond(_Text(await _served(gate, asked.model), asked.request_id), parts, asked)


async def _read(request: Request, gate: Gate, kind: type[Any]) -> Any:
    """The request's body, checked. Raises InvalidRequest, LimitExceeded."""
    body = await read_body(request, gate.config.max_document_bytes)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        field = next((str(part) for part in fault["loc"]), "body")
        raise InvalidRequest(describe(fault), field=field) from None


async def _served(gate: Gate, name: str) -> str:
    served = (await gate.engines.info()).model
    if name != served:
        raise NotFound(f"model {name[:200]!r} isn't served here; this service runs {served!r}", field="model")
    return served


def _session_question(messages: list[tuple[str, str]]) -> str:
    if any(role != "user" for role, _ in messages):
        raise InvalidRequest(
            "with session_id send the user's new messages only: the session has its own past", field="messages"
        )
    return "\n\n".join(content for _, content in messages)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "segcore"}


class _Shape(ABC):
    """How an answer is written down; one for each request."""

    id_prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, model: str, request_id: str | None) -> None:
        name = self.id_prefix + (request_id or uuid.uuid4().hex)
        self.common = {"id": name, "created": int(time.time()), "model": model}

    @abstractmethod
    def choice(self, text: str, logprobs: list[TokenLogprob] | None) -> dict[str, Any]: ...

    @abstractmethod
    def delta(self, text: str, logprobs: list[TokenLogprob] | None, first: bool) -> dict[str, Any]: ...


class _Chat(_Shape):
    id_prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str, logprobs: list[TokenLogprob] | None) -> dict[str, Any]:
        return {
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": _chat_logprobs(logprobs),
        }

    def delta(self, text: str, logprobs: list[TokenLogprob] | None, first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        return {"delta": {**role, "content": text}, "logprobs": _chat_logprobs(logprobs)}


class _Text(_Shape):
    id_prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, model: str, request_id: str | None) -> None:
        super().__init__(model, request_id)
        self._offset = 0

    def choice(self, text: str, logprobs: list[TokenLogprob] | None) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logprobs(logprobs)}

    def delta(self, text: str, logprobs: list[TokenLogprob] | None, first: bool) -> dict[str, Any]:
        return self.choice(text, logprobs)

    def _logprobs(self, logprobs: list[TokenLogprob] | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        offsets = []
        for one in logprobs:
            offsets.append(self._offset)
            self._offset += len(one.text)
        return {
            "tokens": [one.text for one in logprobs],
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [dict(one.likeliest) for one in logprobs],
            "text_offset": offsets,
        }


def _chat_logprobs(logprobs: list[TokenLogprob] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    content = [
        _chat_logprob(one.text, one.logprob) | {"top_logprobs": [_chat_logprob(*top) for top in one.likeliest]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_logprob(text: str, logprob: float) -> dict[str, Any]:
    # Of a token that is a part of a character only the whole's bytes are known.
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _usage(last: AnswerPart) -> dict[str, int]:
    total = last.prompt_tokens + last.answer_tokens
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.answer_tokens,
        "total_tokens": total,
    }


async def _respond(shape: _Shape, parts: AsyncGenerator[AnswerPart], asked: _Common) -> Response:
    if asked.stream_options is not None and not asked.stream:
        raise InvalidRequest("stream_options needs stream to be true", field="stream_options")
    if not asked.stream:
        return JSONResponse(await _whole(shape, parts, asked))
    first = await anext(parts)  # what is refused at once has its status
    return StreamingResponse(
        _events(shape, first, parts, asked), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def _whole(shape: _Shape, parts: AsyncGenerator[AnswerPart], asked: _Common) -> dict[str, Any]:
    text = ""
    logprobs: list[TokenLogprob] = []
    async with aclosing(parts):
        async for part in parts:
            text += part.text
            logprobs += part.logprobs
    choice = shape.choice(text, None if asked.wanted_logprobs is None else logprobs)
    finish = _FINISH[part.finish_reason or "stop"]
    return {
        **shape.common,
        "object": shape.kind,
        "choices": [{"index": 0, **choice, "finish_reason": finish}],
        "usage": _usage(part),
    }


async def _events(
    shape: _Shape, first: AnswerPart, parts: AsyncGenerator[AnswerPart], asked: _Common
) -> AsyncIterator[str]:
    """Server-sent events. An error that comes after the first is an event, since the status is sent already."""
    begun, last = False, first
    part: AnswerPart | None = first
    usage = asked.stream_options is not None and asked.stream_options.include_usage
    try:
        async with aclosing(parts):
            while part is not None:
                logprobs = None if asked.wanted_logprobs is None else list(part.logprobs)
                choice = {"index": 0, **shape.delta(part.text, logprobs, not begun), "finish_reason": None}
                if part.finish_reason is not None:
                    choice["finish_reason"] = _FINISH[part.finish_reason]
                yield _event(shape, [choice], {"usage": None} if usage else {})
                begun, last = True, part
                part = await _next(parts)
        if usage:
            yield _event(shape, [], {"usage": _usage(last)})
        yield "data: [DONE]\n\n"
    except SegcoreError as error:
        yield f"data: {json.dumps(body_of(error))}\n\n"
    except Exception as error:
        yield f"data: {json.dumps(body_of(as_segcore_error(error)))}\n\n"


async def _next(parts: AsyncIterator[AnswerPart]) -> AnswerPart | None:
    async for part in parts:
        return part
    return None


def _event(shape: _Shape, choices: list[dict[str, Any]], more: dict[str, Any]) -> str:
    message = {**shape.common, "object": shape.chunk_kind, "choices": choices, **more}
    return f"data: {json.dumps(message)}\n\n"
