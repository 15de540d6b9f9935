"""The gRPC tier: thin and stateless. Checks, converts, routes by session, and gives every error its status."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream
from ray.serve.handle import DeploymentHandle

from protos.gen.segcore.v1 import segcore_pb2 as pb
from protos.gen.segcore.v1 import segcore_pb2_grpc as stubs
from segcore.errors import InvalidRequest, LimitExceeded
from services.serving import codec
from services.serving.config import ServeConfig
from services.serving.decoding import Time, all_decoded, check_decoded
from services.serving.engines import as_segcore_error
from services.serving.gate import Gate
from services.serving.messages import UploadAck, check_name, session_id_for
from services.serving.status import code_of, trailers_of
from services.serving.tenants import Tenant

R = TypeVar("R")

# By full name, what adds each to a gRPC server.
SERVICES: dict[str, Callable[[Any, Any], None]] = {
    service.full_name: getattr(stubs, f"add_{name}Servicer_to_server")
    for name, service in pb.DESCRIPTOR.services_by_name.items()
}


@dataclasses.dataclass(frozen=True)
class Call:
    """One call: its metadata, and who calls."""

    headers: dict[str, str]
    tenant: Tenant

    def metadata(self, name: str) -> str | None:
        return self.headers.get(name)


def _unary(response: type[Any]) -> Callable[[Any], Any]:
    """Find out who calls, and give every error of a handler its status; raising would lose the details in Serve."""

    def wrap(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        async def run(self: Ingress, request: Any, grpc_context: RayServegRPCContext) -> Any:
            headers = _headers(grpc_context)
            try:
                with self._gate.call("grpc", handler.__name__, headers) as call:
                    check_decoded(request)
                    return await handler(self, request, Call(headers, call.tenant))
            except Exception as error:
                _set_status(grpc_context, error)
                return response()

        return _as_itself(run)

    return wrap


def _streaming(response: type[Any]) -> Callable[[Any], Any]:
    """The same for handlers that stream. Serve sends the context along with messages only: an empty one carries it."""

    def wrap(handler: Callable[..., AsyncGenerator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        @functools.wraps(handler)
        async def run(self: Ingress, requests: Any, grpc_context: RayServegRPCContext) -> AsyncIterator[Any]:
            headers = _headers(grpc_context)
            try:
                with self._gate.call("grpc", handler.__name__, headers) as call:
                    check_decoded(requests)
                    async with aclosing(handler(self, requests, Call(headers, call.tenant))) as responses:
                        async for item in responses:
                            yield item
            except Exception as error:
                _set_status(grpc_context, error)
                yield response()

        return _as_itself(run)

    return wrap


def _as_itself(run: Callable[..., R]) -> Callable[..., R]:
    """Serve gives the context to handlers whose signature names it: so it must see the wrapper's, not the handler's."""
    vars(run).pop("__wrapped__")
    return run


def _set_status(context: RayServegRPCContext, error: Exception) -> None:
    known = as_segcore_error(error)
    context.set_code(code_of(known))
    context.set_details(known.message)
    context.set_trailing_metadata(trailers_of(known))


def _headers(context: Any) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


class Ingress:
    """One method per RPC, by its name; Serve finds it there."""

    def __init__(self, engine: DeploymentHandle, config: ServeConfig) -> None:
        self._gate = Gate(engine, config)
        self._engines, self._config = self._gate.engines, config

    @_unary(pb.GetServerInfoResponse)
    async def GetServerInfo(self, request: pb.GetServerInfoRequest, call: Call) -> pb.GetServerInfoResponse:
        info = await self._engines.info()
        return pb.GetServerInfoResponse(schema_revision=codec.SCHEMA_REVISION, **dataclasses.asdict(info))

    @_unary(pb.CreateSessionResponse)
    async def CreateSession(self, request: pb.CreateSessionRequest, call: Call) -> pb.CreateSessionResponse:
        session_id = request.session_id or call.metadata("session_id") or session_id_for(request.request_id)
        where, ttl_s = _checked(session_id, call), codec.seconds_from(request, "ttl")
        await self._gate.check_sessions(call.tenant, session_id)
        info = await self._engines.call("create", *where, request.model, ttl_s=ttl_s, request_id=request.request_id)
        return pb.CreateSessionResponse(session=codec.session_to(info))

    @_unary(pb.GetSessionResponse)
    async def GetSession(self, request: pb.GetSessionRequest, call: Call) -> pb.GetSessionResponse:
        info = await self._engines.call("get", *_checked(request.session_id, call))
        return pb.GetSessionResponse(session=codec.session_to(info))

    @_unary(pb.ListSessionsResponse)
    async def ListSessions(self, request: pb.ListSessionsRequest, call: Call) -> pb.ListSessionsResponse:
        page = await self._engines.call(
            "list_sessions", call.tenant.name, page_size=request.page_size, page_token=request.page_token
        )
        sessions = [codec.session_to(info) for info in page.sessions]
        return pb.ListSessionsResponse(sessions=sessions, next_page_token=page.next_page_token)

    @_unary(pb.DeleteSessionResponse)
    async def DeleteSession(self, request: pb.DeleteSessionRequest, call: Call) -> pb.DeleteSessionResponse:
        await self._engines.call("delete", *_checked(request.session_id, call), **codec.options_from(request))
        return pb.DeleteSessionResponse()

    @_unary(pb.ForkSessionResponse)
    async def ForkSession(self, request: pb.ForkSessionRequest, call: Call) -> pb.ForkSessionResponse:
        where = _checked(request.session_id, call)
        new_id = request.new_session_id or session_id_for(request.request_id)
        await self._gate.check_sessions(call.tenant, new_id)
        info = await self._engines.call("fork", *where, new_id, **codec.options_from(request))
        return pb.ForkSessionResponse(session=codec.session_to(info))

    @_unary(pb.RewindSessionResponse)
    async def RewindSession(self, request: pb.RewindSessionRequest, call: Call) -> pb.RewindSessionResponse:
        where = _checked(request.session_id, call)
        info = await self._engines.call("rewind", *where, request.tokens, **codec.options_from(request))
        return pb.RewindSessionResponse(session=codec.session_to(info))

    @_streaming(pb.ExportSessionResponse)
    async def ExportSession(
        self, request: pb.ExportSessionRequest, call: Call
    ) -> AsyncGenerator[pb.ExportSessionResponse]:
        async for data in self._engines.export(*_checked(request.session_id, call)):
            yield pb.ExportSessionResponse(data=data)

    @_unary(pb.ImportSessionResponse)
    async def ImportSession(
        self, requests: gRPCInputStream[pb.ImportSessionRequest], call: Call
    ) -> pb.ImportSessionResponse:
        first: pb.ImportSessionRequest | None = None
        data = bytearray()
        async for request in all_decoded(requests):
            first = first or request
            data += request.data
            if len(data) > self._config.max_import_bytes:
                raise LimitExceeded(
                    f"an import may have at most {self._config.max_import_bytes} bytes here",
                    max_import_bytes=self._config.max_import_bytes,
                )
        first = first or pb.ImportSessionRequest()
        session_id = first.session_id or call.metadata("session_id") or session_id_for(first.request_id)
        _checked(session_id, call)
        info = await self._gate.import_session(call.tenant, session_id, bytes(data), first.request_id)
        return pb.ImportSessionResponse(session=codec.session_to(info))

    @_unary(pb.GetDocumentResponse)
    async def GetDocument(self, request: pb.GetDocumentRequest, call: Call) -> pb.GetDocumentResponse:
        where = _checked(request.session_id, call)
        info = await self._engines.call("get_document", *where, request.document_id)
        return pb.GetDocumentResponse(document=codec.document_to(info), window_bytes=self._config.window_bytes)

    @_unary(pb.CancelAnswerResponse)
    async def CancelAnswer(self, request: pb.CancelAnswerRequest, call: Call) -> pb.CancelAnswerResponse:
        where = _checked(request.session_id, call)
        await self._engines.call("cancel_answer", *where, request_id=request.request_id)
        return pb.CancelAnswerResponse()

    @_streaming(pb.UploadDocumentResponse)
    async def UploadDocument(
        self, requests: gRPCInputStream[pb.UploadDocumentRequest], call: Call
    ) -> AsyncGenerator[pb.UploadDocumentResponse]:
        """One response per request. A stream that ends without a finish leaves the document open."""
        header: pb.DocumentHeader | None = None
        time = Time()
        async for request in time.holds(all_decoded(requests)):
            kind = request.WhichOneof("message")
            if kind is None or (kind == "header") != (header is None):
                raise InvalidRequest("an upload is one header, then data, then a finish", field=kind or "message")
            header = header or request.header
            where = (*_checked(header.session_id, call), header.document_id)
            if kind == "header":
                time.begin(codec.seconds_from(header, "timeout"))
            with time.told():
                ack = await self._upload_step(request, header, call.tenant, where, time.ends)
            time.details["committed_offset"] = ack.committed_offset
            yield codec.ack_to(ack, self._config.window_bytes)
            if ack.finished:
                return

    async def _upload_step(
        self,
        request: pb.UploadDocumentRequest,
        header: pb.DocumentHeader,
        tenant: Tenant,
        where: tuple[str, str, str],
        ends: float | None,
    ) -> UploadAck:
        """One request of an upload. where: tenant, session, document."""
        if request.HasField("header"):
            total = header.total_bytes if header.HasField("total_bytes") else None
            options = codec.options_from(header)
            opened: UploadAck = await self._engines.call("open_document", *where, total, ends=ends, **options)
            return opened
        if request.HasField("data"):
            return await self._gate.append(tenant, *where[1:], request.data.offset, request.data.data, ends)
        return await self._gate.finish(tenant, *where[1:], request.finish.total_bytes, request.finish.sha256, ends)

    @_streaming(pb.GenerateResponse)
    async def Generate(self, request: pb.GenerateRequest, call: Call) -> AsyncGenerator[pb.GenerateResponse]:
        params = codec.sampling_from(request.sampling)
        where = _checked(request.session_id, call)
        options = codec.options_from(request) | {"timeout_s": codec.seconds_from(request, "timeout")}
        answer = self._gate.answer(
            call.tenant, where[1], request.question, params, after=request.after_token, **options
        )
        async with aclosing(answer) as parts:
            async for part in parts:
                yield codec.answer_to(part)


def _checked(session_id: str, call: Call) -> tuple[str, str]:
    """Tenant and session of a call. Raises InvalidRequest if the metadata names another session."""
    check_name("session_id", session_id)
    routed = call.metadata("session_id")
    if routed is not None and routed != session_id:
        raise InvalidRequest(
            f"the metadata's session_id is {routed[:80]!r}, the message's {session_id!r}; send the same",
            field="session_id",
        )
    return call.tenant.name, session_id
