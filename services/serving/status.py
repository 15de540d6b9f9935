"""From errors to gRPC statuses with details, and back.

Details travel as google.rpc.Status in the trailer; Serve keeps them only if a handler returns after setting them.
"""

from __future__ import annotations

import re

import grpc
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from segcore import errors

DOMAIN = "segcore"
_TRAILER = "grpc-status-details-bin"

# The first class that matches decides, so the special stands before the general.
_CODES: list[tuple[type[errors.SegcoreError], grpc.StatusCode]] = [
    (errors.InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (errors.UnsupportedModel, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.Conflict, grpc.StatusCode.ABORTED),
    (errors.FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.Busy, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.LimitExceeded, grpc.StatusCode.OUT_OF_RANGE),
    (errors.Cancelled, grpc.StatusCode.CANCELLED),
    (errors.StorageFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.PastKVError, grpc.StatusCode.DATA_LOSS),
    (errors.SessionLost, grpc.StatusCode.DATA_LOSS),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.SegcoreError, grpc.StatusCode.INTERNAL),
]


def reason_of(cls: type[errors.SegcoreError]) -> str:
    """A class's name as an ErrorInfo reason: WrongOffset is WRONG_OFFSET."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).upper()


def code_of(error: errors.SegcoreError) -> grpc.StatusCode:
    return next(code for cls, code in _CODES if isinstance(error, cls))


def trailers_of(error: errors.SegcoreError) -> list[tuple[str, bytes]]:
    """The error as trailing metadata."""
    info = ErrorInfo(reason=reason_of(type(error)), domain=DOMAIN, metadata=error.details)
    status = Status(code=code_of(error).value[0], message=error.message)
    status.details.add().Pack(info)
    if "retry_after_s" in error.details:
        retry = RetryInfo()
        retry.retry_delay.FromMilliseconds(round(float(error.details["retry_after_s"]) * 1000))
        status.details.add().Pack(retry)
    return [(_TRAILER, status.SerializeToString())]


def error_of(call: grpc.aio.AioRpcError) -> errors.SegcoreError:
    """The error that a failed call stands for: what segcore said, or what its status means."""
    code, message = call.code(), call.details() or "the call failed"
    for info in _error_infos(call):
        cls = _BY_REASON.get(info.reason)
        if info.domain == DOMAIN and cls is not None:
            return cls(message, **info.metadata)
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        # The service's own failures bear details; this is a connection that broke, or Serve's word for a dead replica.
        return errors.Unavailable(f"the service can't be reached just now ({message.splitlines()[0][:200]})")
    return _BY_CODE.get(code, errors.SegcoreError)(message)


def _error_infos(call: grpc.aio.AioRpcError) -> list[ErrorInfo]:
    infos = []
    for key, value in tuple(call.trailing_metadata() or ()):
        if key == _TRAILER:
            for detail in Status.FromString(value).details:
                info = ErrorInfo()
                if detail.Unpack(info):
                    infos.append(info)
    return infos


def _tree(cls: type[errors.SegcoreError]) -> list[type[errors.SegcoreError]]:
    return [cls, *(below for child in cls.__subclasses__() for below in _tree(child))]


_BY_REASON = {reason_of(cls): cls for cls in _tree(errors.SegcoreError)}
_BY_CODE: dict[grpc.StatusCode, type[errors.SegcoreError]] = {code: cls for cls, code in reversed(_CODES)}
