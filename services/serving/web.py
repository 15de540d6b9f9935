"""The HTTP face: the OpenAI-compatible API, sessions and their documents, and the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from segcore.errors import InvalidRequest, NotFound, SegcoreError
from services.serving import openai
from services.serving.engines import as_segcore_error
from services.serving.gate import Gate
from services.serving.messages import UploadAck, check_name, session_id_for
from services.serving.tenants import Tenant
from services.serving.weberror import body_of, read_body, read_object, response_of

Endpoint = Callable[[Request, Gate, Tenant], Awaitable[Response]]

_PAGE = Path(__file__).parent / "page"
# Nothing from elsewhere is loaded, run, or told where our users come from.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def web_app(gate: Gate) -> Starlette:
    """The ASGI application."""

    def route(path: str, endpoint: Endpoint, *methods: str) -> Route:
        return Route(path, _admitted(endpoint, gate), methods=list(methods))

    session, document = "/v1/sessions/{session_id}", "/v1/sessions/{session_id}/documents/{document_id}"
    routes = [
        route("/v1/models", openai.models, "GET"),
        route("/v1/models/{model:path}", openai.model, "GET"),
        route("/v1/completions", openai.completions, "POST"),
        route("/v1/chat/completions", openai.chat_completions, "POST"),
        route("/v1/server", server, "GET"),
        route("/v1/sessions", create_session, "POST"),
        route(session, get_session, "GET"),
        route(session, delete_session, "DELETE"),
        route(session + "/fork", fork, "POST"),
        route(session + "/cancel", cancel, "POST"),
        route(session + "/passages", passages, "GET"),
        route(document, append, "PUT"),
        route(document + "/finish", finish, "POST"),
        Route("/healthz", _health(gate)),
        *(Route(path, _file(name)) for path, name in _FILES.items()),
    ]
    routes.append(Route("/favicon.ico", _no_icon))
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})


_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}


async def server(request: Request, gate: Gate, tenant: Tenant) -> Response:
    return JSONResponse(dataclasses.asdict(await gate.engines.info()))


async def create_session(request: Request, gate: Gate, tenant: Tenant) -> Response:
    wanted = await read_object(request, {"session_id": str, "model": str, "request_id": str})
    request_id = wanted.get("request_id", "")
    name = wanted.get("session_id") or session_id_for(request_id)
    check_name("session_id", name)
    await gate.check_sessions(tenant, name)
    info = await gate.engines.call("create", tenant.name, name, wanted.get("model", ""), request_id=request_id)
    return JSONResponse(dataclasses.asdict(info), 201)


async def get_session(request: Request, gate: Gate, tenant: Tenant) -> Response:
    name = request.path_params["session_id"]
    return JSONResponse(dataclasses.asdict(await gate.engines.call("get", tenant.name, name)))


async def delete_session(request: Request, gate: Gate, tenant: Tenant) -> Response:
    name = request.path_params["session_id"]
    await gate.engines.call("delete", tenant.name, name)
    return Response(status_code=204)


async def fork(request: Request, gate: Gate, tenant: Tenant) -> Response:
    name = request.path_params["session_id"]
    wanted = await read_object(request, {"session_id": str, "request_id": str})
    request_id = wanted.get("request_id", "")
    new = wanted.get("session_id") or session_id_for(request_id)
    check_name("session_id", new)
    await gate.check_sessions(tenant, new)
    info = await gate.engines.call("fork", tenant.name, name, new, request_id=request_id)
    return JSONResponse(dataclasses.asdict(info), 201)


async def cancel(request: Request, gate: Gate, tenant: Tenant) -> Response:
    """End the session's answer: one with a request_id waits for its caller to come back."""
    await gate.engines.call("cancel_answer", tenant.name, request.path_params["session_id"])
    return Response(status_code=204)


async def passages(request: Request, gate: Gate, tenant: Tenant) -> Response:
    """The parts of documents that were last chosen."""
    name = request.path_params["session_id"]
    found = await gate.engines.call("passages", tenant.name, name)
    return JSONResponse({"passages": [dataclasses.asdict(passage) for passage in found]})


async def append(request: Request, gate: Gate, tenant: Tenant) -> Response:
    """Bytes of a document at `?offset=`; at 0 they begin it."""
    session_id, document_id = request.path_params["session_id"], request.path_params["document_id"]
    offset = request.query_params.get("offset", "")
    if not (offset.isascii() and offset.isdigit() and len(offset) < 16):
        raise InvalidRequest("?offset= must be the document's committed offset, a whole number", field="offset")
    data = await read_body(request, gate.config.max_data_bytes)
    if offset == "0":
        await gate.engines.call("open_document", tenant.name, session_id, document_id, None)
    ack = await gate.append(tenant, session_id, document_id, int(offset), data)
    return JSONResponse(_ack(ack, gate))


async def finish(request: Request, gate: Gate, tenant: Tenant) -> Response:
    session_id, document_id = request.path_params["session_id"], request.path_params["document_id"]
    said = await read_object(request, {"total_bytes": int, "sha256": str})
    try:
        total, digest = said["total_bytes"], bytes.fromhex(said["sha256"])
    except (KeyError, ValueError):
        raise InvalidRequest("finish needs total_bytes and sha256, in hexadecimal", field="sha256") from None
    ack = await gate.finish(tenant, session_id, document_id, total, digest)
    return JSONResponse(_ack(ack, gate))


def _ack(ack: UploadAck, gate: Gate) -> dict[str, object]:
    return {**dataclasses.asdict(ack), "window_bytes": gate.config.window_bytes}


def _admitted(endpoint: Endpoint, gate: Gate) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that knows who calls, and whose errors have their status and the API's format."""

    async def run(request: Request) -> Response:
        session_id = request.path_params.get("session_id", "")
        try:
            with gate.call("http", endpoint.__name__, request.headers, session_id) as call:
                return await endpoint(request, gate, call.tenant)
        except ClientDisconnect:
            return Response(status_code=400)  # which nobody reads
        except Exception as error:
            return response_of(as_segcore_error(error))

    return run


def _health(gate: Gate) -> Callable[[Request], Awaitable[Response]]:
    async def health(request: Request) -> Response:
        try:
            await gate.engines.info()
        except Exception as error:
            return response_of(as_segcore_error(error))
        return Response("ok", media_type="text/plain")

    return health


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def file(request: Request) -> Response:
        return FileResponse(_PAGE / name, headers=_PAGE_HEADERS)

    return file


async def _no_icon(request: Request) -> Response:
    return Response(status_code=204)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, or method."""
    assert isinstance(error, HTTPException)
    told = {
        404: NotFound(f"there is no {request.url.path[:200]}"),
        405: InvalidRequest("this method isn't allowed here"),
    }
    known: SegcoreError = told.get(error.status_code) or InvalidRequest(str(error.detail))
    return JSONResponse(body_of(known), error.status_code, error.headers)
