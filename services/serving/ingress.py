"""The gRPC tier: thin and stateless. Checks, converts, routes by session, and gives every error its status."""

from __future__ import annotations

import dataclasses
import functools
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream
from ray.serve.handle import DeploymentHandle

from protos.gen.segcore.v1 import segcore_pb2 as pb
from protos.gen.segcore.v1 import segcore_pb2_grpc as stubs
from segcore.errors import InvalidRequest, SegcoreError, Unavailable
from services.serving import codec
from services.serving.config import ServeConfig
from services.serving.messages import check_name
from services.serving.status import code_of, trailers_of

log = logging.getLogger(__name__)

# By full name, what adds each to a gRPC server.
SERVICES: dict[str, Callable[[Any, Any], None]] = {
    service.full_name: getattr(stubs, f"add_{name}Servicer_to_server")
    for name, service in pb.DESCRIPTOR.services_by_name.items()
}


def _unary(response: type[Any]) -> Callable[[Any], Any]:
    """Give every error of a handler its status. It returns then, since raising would lose the details."""

    def wrap(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        async def run(self: Ingress, request: Any, grpc_context: RayServegRPCContext) -> Any:
            try:
                return await handler(self, request, grpc_context)
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
            try:
                async with aclosing(handler(self, requests, grpc_context)) as responses:
                    async for item in responses:
                        yield item
            except Exception as error:
                _set_status(grpc_context, error)
                yield response()

        return run

    return wrap


def _set_status(grpc_context: RayServegRPCContext, error: Exception) -> None:
    known = _as_segcore_error(error)
    grpc_context.set_code(code_of(known))
    grpc_context.set_details(known.message)
    grpc_context.set_trailing_metadata(trailers_of(known))


class Ingress:
    """One method per RPC, by its name; Serve finds it there."""

    def __init__(self, engine: DeploymentHandle, config: ServeConfig) -> None:
        self._engine, self._config = engine, config

    @_unary(pb.GetServerInfoResponse)
    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, grpc_context: RayServegRPCContext
    ) -> pb.GetServerInfoResponse:
        info = await self._engine.info.remote()
        return pb.GetServerInfoResponse(schema_revision=codec.SCHEMA_REVISION, **dataclasses.asdict(info))

    @_unary(pb.CreateSessionResponse)
    async def CreateSession(
        self, request: pb.CreateSessionRequest, grpc_context: RayServegRPCContext
    ) -> pb.CreateSessionResponse:
        session_id = request.session_id or _routed_session(grpc_context) or uuid.uuid4().hex
        info = await self._at(session_id, grpc_context).create.remote(session_id, request.model)
        return pb.CreateSessionResponse(session=codec.session_to(info))

    @_unary(pb.GetSessionResponse)
    async def GetSession(
        self, request: pb.GetSessionRequest, grpc_context: RayServegRPCContext
    ) -> pb.GetSessionResponse:
        info = await self._at(request.session_id, grpc_context).get.remote(request.session_id)
        return pb.GetSessionResponse(session=codec.session_to(info))

    @_unary(pb.DeleteSessionResponse)
    async def DeleteSession(
        self, request: pb.DeleteSessionRequest, grpc_context: RayServegRPCContext
    ) -> pb.DeleteSessionResponse:
        await self._at(request.session_id, grpc_context).delete.remote(request.session_id)
        return pb.DeleteSessionResponse()

    @_unary(pb.GetDocumentResponse)
    async def GetDocument(
        self, request: pb.GetDocumentRequest, grpc_context: RayServegRPCContext
    ) -> pb.GetDocumentResponse:
        engine = self._at(request.session_id, grpc_context)
        info = await engine.get_document.remote(request.session_id, request.document_id)
        return pb.GetDocumentResponse(document=codec.document_to(info), window_bytes=self._config.window_bytes)

    @_unary(pb.CancelAnswerResponse)
    async def CancelAnswer(
        self, request: pb.CancelAnswerRequest, grpc_context: RayServegRPCContext
    ) -> pb.CancelAnswerResponse:
        await self._at(request.session_id, grpc_context).cancel_answer.remote(request.session_id)
        return pb.CancelAnswerResponse()

    @_streaming(pb.UploadDocumentResponse)
    async def UploadDocument(
        self, requests: gRPCInputStream[pb.UploadDocumentRequest], grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.UploadDocumentResponse]:
        """One response per request. A stream that ends without a finish leaves the document open."""
        header: pb.DocumentHeader | None = None
        async for request in requests:
            kind = request.WhichOneof("message")
            if kind is None or (kind == "header") != (header is None):
                raise InvalidRequest("an upload is one header, then data, then a finish", field=kind or "message")
            header = header or request.header
            engine = self._at(header.session_id, grpc_context)
            where = (header.session_id, header.document_id)
            if kind == "header":
                total = header.total_bytes if header.HasField("total_bytes") else None
                ack = await engine.open_document.remote(*where, total)
            elif kind == "data":
                ack = await engine.append.remote(*where, request.data.offset, request.data.data)
            else:
                ack = await engine.finish.remote(*where, request.finish.total_bytes, request.finish.sha256)
            yield codec.ack_to(ack, self._config.window_bytes)
            if ack.finished:
                return

    @_streaming(pb.GenerateResponse)
    async def Generate(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.GenerateResponse]:
        params = codec.sampling_from(request.sampling)
        engine = self._at(request.session_id, grpc_context).options(stream=True)
        parts = engine.generate.remote(request.session_id, request.question, params)
        try:
            async for part in parts:
                yield codec.answer_to(part)
        finally:
            parts.cancel()  # ends the answer if the client went away; no effect once it has ended

    def _at(self, session_id: str, grpc_context: RayServegRPCContext) -> DeploymentHandle:
        """The engine tier, routed by session. Raises InvalidRequest if the metadata names another session."""
        check_name("session_id", session_id)
        routed = _routed_session(grpc_context)
        if routed is not None and routed != session_id:
            raise InvalidRequest(
                f"the metadata's session_id is {routed[:80]!r}, the message's {session_id!r}; send the same",
                field="session_id",
            )
        return self._engine.options(session_id=session_id)


def _routed_session(grpc_context: RayServegRPCContext) -> str | None:
    return next((value for key, value in grpc_context.invocation_metadata() if key == "session_id"), None)


def _as_segcore_error(error: Exception) -> SegcoreError:
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, SegcoreError):
        return cause
    if isinstance(cause, (RayError, RayServeException)):
        log.warning("engine unreachable: %s", cause)
        return Unavailable("the replica that holds the session isn't reachable; try again")
    log.exception("request failed", exc_info=error)
    return SegcoreError("an internal error; the service's log has it")
