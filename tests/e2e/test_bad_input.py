"""Bad input over a real channel: a typed error with the right status and details; afterwards the session is usable."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos.gen.segcore.v1 import segcore_pb2 as pb
from protos.gen.segcore.v1 import segcore_pb2_grpc as stubs
from segcore import errors
from segcore.sampling import SamplingParams
from segcore.text import PIECE_CHARS
from services.serving.client import AsyncClient, Client
from services.serving.status import code_of, error_of
from tests.e2e.conftest import MAX_DOCUMENT_BYTES, MAX_SESSION_TOKENS

pytestmark = pytest.mark.e2e

SHORT = SamplingParams(max_tokens=4)
Request = pb.UploadDocumentRequest


def header(session: str, document: str = "doc", total: int | None = None) -> Request:
    return Request(header=pb.DocumentHeader(session_id=session, document_id=document, total_bytes=total))


def data(offset: int, payload: bytes) -> Request:
    return Request(data=pb.DocumentData(offset=offset, data=payload))


def finish(payload: bytes, *, total: int | None = None, sha256: bytes | None = None) -> Request:
    digest = hashlib.sha256(payload).digest() if sha256 is None else sha256
    return Request(finish=pb.DocumentFinish(total_bytes=len(payload) if total is None else total, sha256=digest))


def ask(client: Client, session: str, question: str = "What?", params: SamplingParams = SHORT) -> str:
    return "".join(part.text for part in client.generate(session, question, params))


UPLOADS: dict[str, tuple[Callable[[str], Iterable[Request]], type[errors.SegcoreError], str]] = {
    "no header": (lambda s: [data(0, b"x")], errors.InvalidRequest, "header"),
    "two headers": (lambda s: [header(s), header(s)], errors.InvalidRequest, "header"),
    "nothing set": (lambda s: [header(s), Request()], errors.InvalidRequest, "header"),
    "empty document": (lambda s: [header(s), finish(b"")], errors.InvalidDocument, "empty"),
    "empty data only": (lambda s: [header(s), data(0, b""), finish(b"")], errors.InvalidDocument, "empty"),
    "invalid UTF-8": (lambda s: [header(s), data(0, b"ab\xff\xfe")], errors.InvalidDocument, "byte 2"),
    "NUL bytes": (lambda s: [header(s), data(0, bytes(4096))], errors.InvalidDocument, "binary"),
    "cut character": (
        lambda s: [header(s), data(0, b"a\xe2\x82"), finish(b"a\xe2\x82")],
        errors.InvalidDocument,
        "end",
    ),
    "offset ahead": (lambda s: [header(s), data(7, b"x")], errors.WrongOffset, "continue there"),
    "offset behind": (lambda s: [header(s), data(0, b"ab"), data(1, b"b")], errors.WrongOffset, "continue there"),
    "negative offset": (lambda s: [header(s), data(-1, b"x")], errors.WrongOffset, "continue there"),
    "wrong digest": (lambda s: [header(s), data(0, b"abc"), finish(b"abd")], errors.InvalidDocument, "SHA-256"),
    "no digest": (
        lambda s: [header(s), data(0, b"abc"), finish(b"abc", sha256=b"")],
        errors.InvalidDocument,
        "SHA-256",
    ),
    "wrong size": (lambda s: [header(s), data(0, b"abc"), finish(b"abc", total=4)], errors.WrongOffset, "3 came"),
    "huge message": (lambda s: [header(s), data(0, b"x" * 70_000)], errors.InvalidRequest, "max_data_bytes"),
    "announced too long": (lambda s: [header(s, total=MAX_DOCUMENT_BYTES + 1)], errors.LimitExceeded, "at most"),
    "announced negative": (lambda s: [header(s, total=-1)], errors.LimitExceeded, "at most"),
    "bad document id": (lambda s: [header(s, "no/slash")], errors.InvalidRequest, "document_id"),
    "not the routed session": (lambda s: [header("absent")], errors.InvalidRequest, "session_id"),
}


@pytest.mark.parametrize("case", UPLOADS)
def test_bad_uploads_are_refused_and_leave_the_session_usable(address, client, session, case):
    requests, expected, message = UPLOADS[case]
    with grpc.insecure_channel(address) as channel:
        call = stubs.DocumentServiceStub(channel).UploadDocument(
            iter(requests(session)), metadata=[("session_id", session)], timeout=20
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() is code_of(expected("")), caught.value.details()
    assert message in caught.value.details()
    assert "Traceback" not in caught.value.details()
    # What was committed can be ended as a shorter document, or was never begun; either way the session goes on.
    documents = client.get_session(session).documents
    if documents and documents[0].committed_offset:
        if case == "cut character":
            rest = [header(session), data(3, b"\xac"), finish("a€".encode())]
        else:
            rest = [header(session), finish(b"abc"[: documents[0].committed_offset])]
        with grpc.insecure_channel(address) as channel:
            acks = list(stubs.DocumentServiceStub(channel).UploadDocument(iter(rest), timeout=20))
        assert acks[-1].finished
    assert client.upload(session, "A good document.").finished
    assert ask(client, session)


def test_details_say_where_to_continue(address, session):
    async def upload() -> errors.SegcoreError:
        async with AsyncClient(address) as client:
            call = client.open_upload(session)
            for request in (header(session), data(0, b"abc"), data(9, b"x")):
                await call.write(request)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [response async for response in call]
            return error_of(caught.value)

    error = asyncio.run(upload())
    assert isinstance(error, errors.WrongOffset)
    assert error.details == {"committed_offset": "3"}


QUESTIONS: dict[str, tuple[Callable[[Client, str], Any], type[errors.SegcoreError]]] = {
    "unknown session": (lambda c, s: ask(c, "absent"), errors.NotFound),
    "bad session id": (lambda c, s: ask(c, "no/slash"), errors.InvalidRequest),
    "no answer to cancel": (lambda c, s: c.cancel_answer("absent"), errors.NotFound),
    "no session id": (lambda c, s: ask(c, ""), errors.InvalidRequest),
    "empty question": (lambda c, s: ask(c, s, "  \n"), errors.InvalidRequest),
    "NUL in the question": (lambda c, s: ask(c, s, "a\0b"), errors.InvalidRequest),
    "endless question": (lambda c, s: ask(c, s, "x" * 200_000), errors.InvalidRequest),
    "unknown model": (lambda c, s: c.create_session(model="gpt-17"), errors.NotFound),
    "session taken": (lambda c, s: c.create_session(s), errors.AlreadyExists),
    "long session id": (lambda c, s: c.create_session("x" * 65), errors.InvalidRequest),
    "unknown document": (lambda c, s: c.get_document(s, "absent"), errors.NotFound),
    "deleted twice": (lambda c, s: c.delete_session("absent"), errors.NotFound),
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_bad_calls_are_refused(client, session, case):
    call, expected = QUESTIONS[case]
    with pytest.raises(errors.SegcoreError) as caught:
        call(client, session)
    assert type(caught.value) is expected, caught.value
    assert client.upload(session, "A good document.").finished
    assert ask(client, session)


@pytest.mark.parametrize(
    "field",
    [
        {"max_tokens": 0},
        {"max_tokens": -5},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"seed": -1},
        {"stop": [""]},
        {"stop": ["x"] * 17},
    ],
    ids=str,
)
def test_absurd_parameters_are_refused(address, session, field):
    request = pb.GenerateRequest(session_id=session, question="What?", sampling=pb.SamplingParams(**field))
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(stubs.GenerationServiceStub(channel).Generate(request, timeout=20))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert next(iter(field)) in caught.value.details()


def test_metadata_that_names_another_session_is_refused(address, session):
    request = pb.GetSessionRequest(session_id=session)
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        stubs.SessionServiceStub(channel).GetSession(request, metadata=[("session_id", "other")], timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_document_beyond_the_limit_is_refused_where_it_crosses_it(client, session):
    with pytest.raises(errors.LimitExceeded, match="at most"):
        client.upload(session, b"word " * (MAX_DOCUMENT_BYTES // 5 + 1), document_id="doc")
    committed = client.get_document(session, "doc").committed_offset
    assert 0 < committed <= MAX_DOCUMENT_BYTES
    assert client.upload(session, b"word " * (committed // 5) + b"word "[: committed % 5], document_id="doc").finished
    assert ask(client, session)


def test_a_stream_beyond_the_longest_session_is_refused(client, session):
    client.upload(session, "x" * (MAX_DOCUMENT_BYTES - 1000))
    with pytest.raises(errors.LimitExceeded, match=str(MAX_SESSION_TOKENS)):
        client.upload(session, "y" * 7000, document_id="more")
    committed = client.get_document(session, "more").committed_offset
    assert 0 < committed < 7000
    assert client.upload(session, "y" * committed, document_id="more").finished


def test_more_sessions_than_the_engines_hold(client, config):
    """They wait in the directory, and are taken up again when they are asked."""
    opened = [client.create_session().session_id for _ in range(2 * config.max_sessions + 4)]
    for session in opened:
        client.upload(session, "A good document.")
    first = ask(client, opened[0])
    assert all(ask(client, session) == first for session in opened[1:])
    assert {info.session_id for info in client.list_sessions()} >= set(opened)
    for session in opened:
        client.delete_session(session)


def test_a_question_waits_for_an_open_document(address, client, session):
    with grpc.insecure_channel(address) as channel:
        list(stubs.DocumentServiceStub(channel).UploadDocument(iter([header(session), data(0, b"abc")]), timeout=20))
    with pytest.raises(errors.FailedPrecondition, match="still open at byte 3") as caught:
        ask(client, session)
    assert caught.value.details["committed_offset"] == "3"
    with pytest.raises(errors.FailedPrecondition, match="still open"):
        client.upload(session, "another", document_id="another")


def test_a_client_that_vanishes_before_its_first_byte_leaves_nothing(address, client, session):
    with grpc.insecure_channel(address) as channel:
        call = stubs.DocumentServiceStub(channel).UploadDocument(iter([header(session)]), timeout=20)
        next(call)
        call.cancel()
    assert client.upload(session, "A good document.", document_id="other").finished
    assert ask(client, session)


def test_a_deleted_session_ends_its_work(client):
    session = client.create_session().session_id
    client.upload(session, "A good document.")
    parts = client.generate(session, "What?", SamplingParams(max_tokens=100_000))
    next(parts)
    client.delete_session(session)
    with pytest.raises(errors.Cancelled):
        list(parts)
    with pytest.raises(errors.NotFound):
        client.get_session(session)


def test_an_engine_that_lags_pushes_back(address, client, session):
    """A client that ignores window and acknowledgements can't make the service hold what it has not run."""

    def flood() -> Iterable[Request]:
        yield header(session)
        for i in range(9):
            yield data(2000 * i, b"z" * 2000)

    with grpc.insecure_channel(address) as channel:
        call = stubs.DocumentServiceStub(channel).UploadDocument(flood(), timeout=60)
        most = 0
        for _ in range(20):
            most = max(most, client.get_session(session).pending_tokens)
            time.sleep(0.02)
        call.cancel()
    # What makes `append` wait, and beyond it the piece of text that one message completes.
    assert most <= 1024 + PIECE_CHARS + 2000


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["CreateSession", "GetSession", "Generate", "UploadDocument"]), body=st.binary(max_size=60)
)
def test_malformed_messages_never_break_the_service(address, method, body):
    service = {"Generate": "GenerationService", "UploadDocument": "DocumentService"}.get(method, "SessionService")
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(f"/segcore.v1.{service}/{method}")(iter([body]), timeout=20)
        with suppress(grpc.RpcError):
            list(call)
        assert call.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
        assert "Traceback" not in (call.details() or "")


def test_the_service_says_what_it_runs(client):
    info = client.server_info()
    assert info.policy == "segmented"
    assert info.segment_tokens == 64
    # 4 cells x (keys and values) x 8 dimensions x 4 bytes, and 2 selectors' keys.
    assert info.past_bytes_per_token == 4 * 2 * 8 * 4 + 2 * 8 * 4
    assert info.max_session_tokens == MAX_SESSION_TOKENS
