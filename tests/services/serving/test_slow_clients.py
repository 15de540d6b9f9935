"""Clients that don't read, that hardly send, and that send what nobody can take: they hold nobody up, and no memory."""

from __future__ import annotations

import gc
import hashlib
import http.client
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import grpc
import psutil
import pytest

from protos.gen.segcore.v1 import segcore_pb2 as pb
from protos.gen.segcore.v1 import segcore_pb2_grpc as stubs
from segcore.sampling import SamplingParams
from services.serving.client import Client
from tests.services.serving.fronts import RunningFront

SHORT = SamplingParams(max_tokens=8)
DOCUMENT = "The café at № 7 opens at 9 o'clock. ".encode() * 3
FLOOD_BYTES, PIECE_BYTES = 200 * 2**20, 2**20
# What gRPC's buffers may hold of a flood, on both sides, and what Python keeps of it.
MOST_SENT_BYTES, MOST_GROWTH_BYTES = 24 * 2**20, 64 * 2**20


@pytest.fixture(scope="module")
def served(front: Callable[..., RunningFront]) -> RunningFront:
    return front()


@pytest.fixture
def client(served: RunningFront) -> Iterator[Client]:
    with Client(served.grpc) as made:
        yield made


def data(offset: int, payload: bytes) -> pb.UploadDocumentRequest:
    return pb.UploadDocumentRequest(data=pb.DocumentData(offset=offset, data=payload))


def header(session: str) -> pb.UploadDocumentRequest:
    return pb.UploadDocumentRequest(header=pb.DocumentHeader(session_id=session, document_id="d"))


def finish(document: bytes) -> pb.UploadDocumentRequest:
    digest = hashlib.sha256(document).digest()
    return pb.UploadDocumentRequest(finish=pb.DocumentFinish(total_bytes=len(document), sha256=digest))


def ask(client: Client, session: str) -> str:
    return "".join(part.text for part in client.generate(session, "When?", SHORT))


def until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_a_client_that_never_reads_holds_nobody_up(served, client, tell):
    """Its answer is written down to its end; its connection, over either protocol, is its own matter."""
    unread, other = client.create_session("unread").session_id, client.create_session("other").session_id
    client.upload(other, DOCUMENT)
    expected = ask(client, client.fork_session(other).session_id)
    web = http.client.HTTPConnection(served.http.removeprefix("http://"), timeout=60)
    body = {"model": client.server_info().model, "stream": True, "prompt": "Once", "max_tokens": 1000}
    with grpc.insecure_channel(served.grpc) as channel:
        request = pb.GenerateRequest(session_id=unread, question="What?", request_id="r")
        request.sampling.max_tokens = 400
        call = stubs.GenerationServiceStub(channel).Generate(request, timeout=120)
        web.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        assert ask(client, other) == expected
        until(lambda: not client.get_session(unread).answering)
        call.cancel()
    web.close()
    parts = list(client.generate(unread, "What?", SamplingParams(max_tokens=400), request_id="r"))
    assert parts[-1].finish_reason is not None
    tell("a client that never reads, over gRPC and HTTP: the others' answers are the same, its own is whole")
    for info in list(client.list_sessions()):
        client.delete_session(info.session_id)


def test_a_client_that_sends_byte_by_byte_holds_nobody_up(client, served, engine, tell):
    """Between two bytes it has no claim on its session, no slot, and no thread; what comes of it is the same."""
    slow, other = client.create_session("slow").session_id, client.create_session("other").session_id
    client.upload(other, DOCUMENT)
    expected = ask(client, client.fork_session(other).session_id)
    seen: list[bool] = []

    def drip() -> Iterator[pb.UploadDocumentRequest]:
        yield header(slow)
        half = len(DOCUMENT) // 2
        for i in range(len(DOCUMENT)):
            if i == half:  # a long pause; others go on
                until(lambda: client.get_session(slow).documents[0].committed_offset == half)
                seen.append(all(not live.calls for live in engine._sessions._lives._lives.values()))
                seen.append(ask(client, other) == expected)
            yield data(i, DOCUMENT[i : i + 1])
        yield finish(DOCUMENT)

    with grpc.insecure_channel(served.grpc) as channel:
        acks = list(stubs.DocumentServiceStub(channel).UploadDocument(drip(), timeout=120))
    assert seen == [True, True]
    assert acks[-1].finished
    assert ask(client, slow) == expected
    tell(f"a client that sends byte by byte, {len(DOCUMENT)} of them: 0 lost, and nobody waited")
    for info in list(client.list_sessions()):
        client.delete_session(info.session_id)


def test_a_flood_against_a_sleeping_engine_takes_no_memory(client, served, engine, monkeypatch, tell):
    """200 MiB of document, sent as fast as may be by a client that heeds no window, and an engine that runs nothing."""
    session = client.create_session().session_id
    kept = engine._engine.room
    monkeypatch.setattr(engine._engine, "room", lambda _: Future())
    sent = [0]

    def flood() -> Iterator[pb.UploadDocumentRequest]:
        yield header(session)
        yield data(0, DOCUMENT)
        while sent[0] < FLOOD_BYTES:
            sent[0] += PIECE_BYTES
            yield data(len(DOCUMENT), bytes(PIECE_BYTES))

    gc.collect()
    process = psutil.Process()
    before = most = process.memory_info().rss
    with grpc.insecure_channel(served.grpc) as channel:
        call = stubs.DocumentServiceStub(channel).UploadDocument(flood(), timeout=120)
        next(call)  # the header's
        until(lambda: client.get_session(session).documents[0].committed_offset == len(DOCUMENT))
        ends, last = time.monotonic() + 3, -1
        while time.monotonic() < ends:  # it comes to rest
            most = max(most, process.memory_info().rss)
            ends, last = (time.monotonic() + 1, sent[0]) if sent[0] != last else (ends, last)
            time.sleep(0.02)
        assert call.is_active()
        call.cancel()
    tell(f"the client could send {sent[0] / 2**20:.0f} of 200 MiB; memory {(most - before) / 2**20:+.0f} MiB")
    assert sent[0] <= MOST_SENT_BYTES
    assert most - before <= MOST_GROWTH_BYTES
    monkeypatch.setattr(engine._engine, "room", kept)
    document = client.get_document(session, "d")
    assert document.committed_offset == len(DOCUMENT)  # nothing of what couldn't be taken
    assert client.upload(session, DOCUMENT, document_id="d").finished
    assert ask(client, session)
    client.delete_session(session)
