"""Errors over HTTP: a status, and a body in the OpenAI API's format."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from segcore import errors
from segcore.errors import InvalidRequest, LimitExceeded, SegcoreError
from services.serving.status import reason_of

# The first class that matches decides, so the special stands before the general.
_STATUSES: list[tuple[type[SegcoreError], int, str]] = [
    (errors.InvalidInput, 400, "invalid_request_error"),
    (errors.Unauthenticated, 401, "authentication_error"),
    (errors.NotFound, 404, "not_found_error"),
    (errors.Conflict, 409, "conflict_error"),
    (errors.FailedPrecondition, 409, "conflict_error"),
    (errors.Busy, 429, "rate_limit_error"),
    (errors.LimitExceeded, 400, "invalid_request_error"),
    (errors.StorageFull, 507, "server_error"),
    (errors.Unavailable, 503, "server_error"),
    (errors.Cancelled, 503, "server_error"),
    (errors.SegcoreError, 500, "server_error"),
]


def status_of(error: SegcoreError) -> int:
    return next(status for cls, status, _ in _STATUSES if isinstance(error, cls))


def body_of(error: SegcoreError) -> dict[str, Any]:
    kind = next(kind for cls, _, kind in _STATUSES if isinstance(error, cls))
    code = reason_of(type(error)).lower()
    return {"error": {"message": error.message, "type": kind, "param": error.details.get("field"), "code": code}}


def response_of(error: SegcoreError) -> JSONResponse:
    headers: dict[str, str] = {}
    if "retry_after_s" in error.details:
        seconds = float(error.details["retry_after_s"])
        headers |= {"Retry-After": str(math.ceil(seconds)), "retry-after-ms": str(round(seconds * 1000))}
    if isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_of(error), status_of(error), headers)


async def read_body(request: Request, limit: int) -> bytes:
    """A request's body. Raises LimitExceeded if it is longer than `limit` bytes, before all of it is read."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise LimitExceeded(f"the request's body is longer than {limit} bytes", field="body")
    return bytes(body)


async def read_object(request: Request, fields: dict[str, type], limit: int = 100_000) -> dict[str, Any]:
    """A small JSON object, of which `fields` names all that it may hold. Raises InvalidRequest."""
    body = await read_body(request, limit)
    try:
        made = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise InvalidRequest("the body isn't JSON", field="body") from None
    if not isinstance(made, dict):
        raise InvalidRequest("the body isn't a JSON object", field="body")
    for name, value in made.items():
        if name not in fields:
            raise InvalidRequest(f"{name[:80]!r}: there is no such key", field=name[:80])
        if type(value) is not fields[name]:
            raise InvalidRequest(f"{name!r} must be of type {fields[name].__name__}", field=name)
    return made
