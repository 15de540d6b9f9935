"""The gRPC tier: thin and stateless. Checks, converts, routes by session, and gives every error its status."""

from __future__ import annotations

import dataclasses
import functools
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream
from ray.serve.handle import DeploymentHandle

from protos.gen.segcore.v1 import segcore_pb2 as pb
from protos.gen.segcore.v1 import segcore_pb2_grpc as stubs
from segcore.errors import InvalidRequest
from services.serving import codec
from services.serving.config import ServeConfig
from services.serving.gate import Gate, known_error
from services.serving.messages import check_name
from services.serving.status import code_of, trailers_of
from services.serving.tenants import Tenant

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
                    return await handler(self, request, Call(headers, call.tenant))
            except Exception as error:
                _set_status(grpc_context, error)
                return response()

        return run

    return wrap


def _streaming(response: type[Any]) -> Callable[[Any], Any]:
    """The same for handlers that stream. Serve sends the context along with messages only: an empty one carries it."""

    def wrap(handler: Callable[..., AsyncGenerator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        @functools.wraps(handler)
        async def run(self: Ingress, requests: Any, grpc_context: RayServegRPCContext) -> AsyncIterator[Any]:
            headers = _headers(grpc_context)
            try:
                with self._gate.call("grpc", handler.__name__, headers) as call:
                    async with aclosing(handler(self, requests, Call(headers, call.tenant))) as responses:
                        async for item in responses:
                            yield item
            except Exception as error:
                _set_status(grpc_context, error)
                yield response()

        return run

    return wrap


def _set_status(context: RayServegRPCContext, error: Exception) -> None:
    known = known_error(error)
    context.set_code(code_of(known))
    context.set_details(known.message)
    context.set_trailing_metadata(trailers_of(known))


def _headers(context: Any) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


class Ingress:
    """One method per RPC, by its name; Serve finds it there."""

    def __init__(self, engine: DeploymentHandle, config: ServeConfig) -> None:
        self._gate = Gate(engine, config)

    @_unary(pb.GetServerInfoResponse)
    async def GetServerInfo(self, request: pb.GetServerInfoRequest, call: Call) -> pb.GetServerInfoResponse:
        info = await self._gate.info()
        return pb.GetServerInfoResponse(schema_revision=codec.SCHEMA_REVISION, **dataclasses.asdict(info))

    @_unary(pb.CreateSessionResponse)
    async def CreateSession(self, request: pb.CreateSessionRequest, call: Call) -> pb.CreateSessionResponse:
        session_id = request.session_id or call.metadata("session_id") or uuid.uuid4().hex
        await self._gate.check_sessions(call.tenant)
        info = await self._at(session_id, call).create.remote(call.tenant.name, session_id, request.model)
        return pb.CreateSessionResponse(session=codec.session_to(info))

    @_unary(pb.GetSessionResponse)
    async def GetSession(self, request: pb.GetSessionRequest, call: Call) -> pb.GetSessionResponse:
        info = await self._at(request.session_id, call).get.remote(call.tenant.name, request.session_id)
        return pb.GetSessionResponse(session=codec.session_to(info))

    @_unary(pb.DeleteSessionResponse)
    async def DeleteSession(self, request: pb.DeleteSessionRequest, call: Call) -> pb.DeleteSessionResponse:
        await self._at(request.session_id, call).delete.remote(call.tenant.name, request.session_id)
        return pb.DeleteSessionResponse()

    @_unary(pb.GetDocumentResponse)
    async def GetDocument(self, request: pb.GetDocumentRequest, call: Call) -> pb.GetDocumentResponse:
        engine = self._at(request.session_id, call)
        info = await engine.get_document.remote(call.tenant.name, request.session_id, request.document_id)
        return pb.GetDocumentResponse(document=codec.document_to(info), window_bytes=self._gate.config.window_bytes)

    @_unary(pb.CancelAnswerResponse)
    async def CancelAnswer(self, request: pb.CancelAnswerRequest, call: Call) -> pb.CancelAnswerResponse:
        await self._at(request.session_id, call).cancel_answer.remote(call.tenant.name, request.session_id)
        return pb.CancelAnswerResponse()

    @_streaming(pb.UploadDocumentResponse)
    async def UploadDocument(
        self, requests: gRPCInputStream[pb.UploadDocumentRequest], call: Call
    ) -> AsyncGenerator[pb.UploadDocumentResponse]:
        """One response per request. A stream that ends without a finish leaves the document open."""
        header: pb.DocumentHeader | None = None
        async for request in requests:
            kind = request.WhichOneof("message")
            if kind is None or (kind == "header") != (header is None):
                raise InvalidRequest("an upload is one header, then data, then a finish", field=kind or "message")
            header = header or request.header
            engine = self._at(header.session_id, call)
            where = (call.tenant.name, header.session_id, header.document_id)
            if kind == "header":
                total = header.total_bytes if header.HasField("total_bytes") else None
                ack = await engine.open_document.remote(*where, total)
            elif kind == "data":
                ack = await self._gate.append(
                    call.tenant, header.session_id, header.document_id, request.data.offset, request.data.data
                )
            else:
                ack = await engine.finish.remote(*where, request.finish.total_bytes, request.finish.sha256)
            yield codec.ack_to(ack, self._gate.config.window_bytes)
            if ack.finished:
                return

    @_streaming(pb.GenerateResponse)
    async def Generate(self, request: pb.GenerateRequest, call: Call) -> AsyncGenerator[pb.GenerateResponse]:
        params = codec.sampling_from(request.sampling)
        self._at(request.session_id, call)
        async with aclosing(self._gate.answer(call.tenant, request.session_id, request.question, params)) as parts:
            async for part in parts:
                yield codec.answer_to(part)

    def _at(self, session_id: str, call: Call) -> DeploymentHandle:
        """The gate's `engine`; raises InvalidRequest also if the metadata names another session."""
        check_name("session_id", session_id)
        routed = call.metadata("session_id")
        if routed is not None and routed != session_id:
            raise InvalidRequest(
                f"the metadata's session_id is {routed[:80]!r}, the message's {session_id!r}; send the same",
                field="session_id",
            )
        return self._gate.engine(session_id)
