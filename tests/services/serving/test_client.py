"""The Python clients' deadlines, generations and patience, over a real channel."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress

import grpc
import pytest

from protos.gen.segcore.v1 import segcore_pb2 as pb
from protos.gen.segcore.v1 import segcore_pb2_grpc as stubs
from segcore.errors import Busy, Conflict, DeadlineExceeded, SegcoreError, Unavailable
from segcore.sampling import SamplingParams
from services.serving.client import AsyncClient, Client
from services.serving.client.retries import Deadline, Patience
from services.serving.status import error_of
from services.serving.tenants import token_hash
from tests.services.serving.conftest import DOCUMENT, QUESTION
from tests.services.serving.fronts import RunningFront

PARAMS = SamplingParams(max_tokens=30, stop=("ÿ",), temperature=1.0, seed=1)


@pytest.fixture(scope="module")
def served(front: Callable[..., RunningFront]) -> RunningFront:
    return front()


@pytest.fixture
def client(served: RunningFront) -> Iterator[Client]:
    with Client(served.grpc) as made:
        yield made
        for info in list(made.list_sessions()):
            made.delete_session(info.session_id)


@contextmanager
def standing_still(engine) -> Iterator[None]:
    """The engine runs nothing."""
    inner = engine._engine
    with inner._changed:
        inner._interrupting += 1
    yield
    with inner._changed:
        inner._interrupting -= 1
        inner._changed.notify_all()


def ask(client: Client, session: str, **options: object) -> str:
    return "".join(part.text for part in client.generate(session, QUESTION, PARAMS, **options))  # type: ignore[arg-type]


def test_an_upload_whose_time_is_up_says_what_is_committed_and_goes_on(client, engine):
    whole, late = client.create_session().session_id, client.create_session().session_id
    client.upload(whole, DOCUMENT)
    expected = ask(client, whole)
    with standing_still(engine), pytest.raises(DeadlineExceeded) as caught:
        client.upload(late, DOCUMENT, timeout_s=0.3)
    committed = int(caught.value.details["committed_offset"])
    document = caught.value.details["document_id"]
    assert 0 < committed < len(DOCUMENT)
    assert client.get_document(late, document).committed_offset == committed
    assert f"/{late}" not in engine._engine._sessions  # the engine has let go of it
    assert client.upload(late, DOCUMENT, document_id=document, timeout_s=60).committed_offset == len(DOCUMENT)
    assert ask(client, late) == expected


def test_a_call_that_says_nothing_more_ends_when_its_time_is_up(client, served):
    """It is told by the service, though no message of its own comes."""
    session, over = client.create_session().session_id, threading.Event()

    def stalled() -> Iterator[pb.UploadDocumentRequest]:
        header = pb.DocumentHeader(session_id=session, document_id="d")
        header.timeout.FromMilliseconds(400)
        yield pb.UploadDocumentRequest(header=header)
        yield pb.UploadDocumentRequest(data=pb.DocumentData(offset=0, data=b"A text."))
        over.wait(30)

    with grpc.insecure_channel(served.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        for _ in stubs.DocumentServiceStub(channel).UploadDocument(stalled(), timeout=30):
            pass
    over.set()
    assert isinstance(error_of(caught.value), DeadlineExceeded)
    assert error_of(caught.value).details["committed_offset"] == "7"


def test_an_answer_whose_time_is_up_goes_on_under_its_name(client, engine):
    session = client.create_session().session_id
    client.upload(session, DOCUMENT)
    expected = ask(client, client.fork_session(session).session_id)
    with standing_still(engine), pytest.raises(DeadlineExceeded) as caught:
        ask(client, session, timeout_s=0.2, request_id="r")
    assert caught.value.details["token_index"] == "0"
    assert engine._engine._scheduler.idle
    assert client.get_session(session).answering
    assert ask(client, session, request_id="r", timeout_s=60) == expected


def test_an_answer_without_a_name_ends_when_its_time_is_up(client, engine):
    session = client.create_session().session_id
    client.upload(session, "A text.")
    with standing_still(engine), pytest.raises(DeadlineExceeded):
        ask(client, session, timeout_s=0.2)
    assert not client.get_session(session).answering
    assert ask(client, session)


def test_an_answer_that_nobody_can_take_up_ends_when_its_time_is_up(client, served, engine):
    """A caller of the bare protocol, who named no request."""
    session = client.create_session().session_id
    client.upload(session, "A text.")
    request = pb.GenerateRequest(session_id=session, question=QUESTION)
    request.timeout.FromMilliseconds(200)
    with grpc.insecure_channel(served.grpc) as channel, standing_still(engine):
        answer = stubs.GenerationServiceStub(channel).Generate(request, timeout=30)
        with pytest.raises(grpc.RpcError) as caught:
            list(answer)
    assert isinstance(error_of(caught.value), DeadlineExceeded)
    assert not client.get_session(session).answering


def test_an_answer_that_nobody_can_take_up_ends_with_its_stream(client, served, engine, monkeypatch):
    """The service is full when its stream is taken up again."""
    session = client.create_session().session_id
    client.upload(session, "A text.")
    generate = engine.generate

    async def cut(*args: object, **options: object) -> AsyncIterator[object]:
        async with aclosing(generate(*args, **options)) as parts:
            yield await anext(parts)
        raise Busy("full")

    monkeypatch.setattr(engine, "generate", cut)
    with pytest.raises(Busy) as caught:
        ask(client, session)
    assert int(caught.value.details["token_index"]) > 0
    assert not client.get_session(session).answering
    with grpc.insecure_channel(served.grpc) as channel:
        bare = stubs.GenerationServiceStub(channel)
        answer = bare.Generate(pb.GenerateRequest(session_id=session, question=QUESTION), timeout=30)
        with pytest.raises(grpc.RpcError, match="full"):
            list(answer)
    assert not client.get_session(session).answering


def test_a_headers_time_is_up_though_no_engine_takes_it(client, served, engine, monkeypatch):
    async def away(*_: object, **__: object) -> None:
        raise Unavailable("away")

    monkeypatch.setattr(engine, "open_document", away)
    header = pb.DocumentHeader(session_id=client.create_session().session_id, document_id="d")
    header.timeout.FromMilliseconds(300)
    began = time.monotonic()
    requests = iter([pb.UploadDocumentRequest(header=header)])
    with grpc.insecure_channel(served.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        list(stubs.DocumentServiceStub(channel).UploadDocument(requests, timeout=10))
    assert isinstance(error_of(caught.value), DeadlineExceeded)
    assert time.monotonic() - began < 5


def test_a_service_that_says_nothing_takes_no_more_than_the_time():
    with socket.create_server(("127.0.0.1", 0)) as silent, Client(f"127.0.0.1:{silent.getsockname()[1]}") as client:
        for call, detail in (
            (lambda: client.upload("s", "A text.", timeout_s=0.2), "committed_offset"),
            (lambda: ask(client, "s", timeout_s=0.2, request_id="r"), "token_index"),
        ):
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded) as caught:
                call()
            assert caught.value.details[detail] == "0"
            assert time.monotonic() - began < 10


def test_writes_at_another_generation_are_refused(client):
    made = client.create_session()
    session, old = made.session_id, {"expected_generation": made.generation}
    first = client.upload(session, DOCUMENT, **old)
    assert first.finished  # its own writes are expected
    for call in (
        lambda: client.upload(session, "More.", **old),
        lambda: ask(client, session, **old),
        lambda: client.fork_session(session, **old),
        lambda: client.rewind_session(session, 0, **old),
        lambda: client.delete_session(session, **old),
    ):
        with pytest.raises(Conflict) as caught:
            call()
        assert caught.value.details["generation"] == str(first.generation)
    parts = list(client.generate(session, QUESTION, PARAMS, expected_generation=first.generation))
    client.delete_session(session, expected_generation=parts[-1].generation)


def test_the_asynchronous_client_says_the_same(served):
    async def outcomes() -> AsyncIterator[SegcoreError]:
        async with AsyncClient(served.grpc) as client:
            made = await client.create_session()
            await client.upload(made.session_id, "A text.")
            for call in (
                client.upload(made.session_id, "More.", expected_generation=made.generation),
                _all(client.generate(made.session_id, QUESTION, expected_generation=made.generation)),
                client.upload(made.session_id, "More.", timeout_s=0),
                _all(client.generate(made.session_id, QUESTION, timeout_s=0)),
            ):
                with pytest.raises(SegcoreError) as caught:
                    await call
                yield caught.value
            await client.delete_session(made.session_id)

    async def kinds() -> list[type[SegcoreError]]:
        return [type(error) async for error in outcomes()]

    assert asyncio.run(kinds()) == [Conflict, Conflict, DeadlineExceeded, DeadlineExceeded]


async def _all(parts: AsyncIterator[object]) -> list[object]:
    return [part async for part in parts]


def test_an_answer_is_ended_by_its_name_alone(client):
    session = client.create_session().session_id
    client.upload(session, "A text.")
    parts = client.generate(session, QUESTION, SamplingParams(max_tokens=3000), request_id="mine")
    next(parts)
    client.cancel_answer(session, request_id="another")
    assert client.get_session(session).answering
    client.cancel_answer(session, request_id="mine")
    assert not client.get_session(session).answering
    assert list(parts)[-1].finish_reason is None


LIMIT = 30_000


@pytest.fixture
def limited(front: Callable[..., RunningFront], tmp_path) -> RunningFront:
    """A front whose only tenant may run 30,000 tokens a minute, and has none left of the last."""
    file = tmp_path / "tenants.json"
    tenant = {"name": "t", "tokens": [token_hash("t")], "tokens_per_minute": LIMIT}
    file.write_text(json.dumps({"tenants": [tenant]}))
    made = front(tenants=file)
    made.gate._quotas.charge(made.gate._tenants.authenticate("Bearer t"), "tokens", LIMIT)
    return made


def test_documents_tokens_count_and_an_upload_goes_on_after_the_hint(limited, engine):
    """It is refused again and again in its middle; nothing of it is lost, or there twice.

    The quota's clock goes on with the hints alone: how fast the machine is makes no difference.
    """
    quotas, hints, now = limited.gate._quotas, list[float](), time.monotonic()
    quotas._clock = lambda: now + sum(hints)
    take = quotas.take

    def told(*args: object) -> None:
        try:
            take(*args)
        except Busy as busy:
            hints.append(float(busy.details["retry_after_s"]))
            raise

    quotas.take = told
    with Client(limited.grpc, token="t") as client:
        session = client.create_session().session_id
        client.upload(session, DOCUMENT, document_id="d")
        tokens = client.get_session(session).processed_tokens
        assert sum(hints) > (tokens - 300) * 60 / LIMIT  # but for the last message all was made up for
        assert len(hints) >= 3
        assert limited.call(engine._sessions.document_bytes("t", session, "d")) == DOCUMENT
        bucket = quotas._bucket(limited.gate._tenants.authenticate("Bearer t"), "tokens")
        bucket.level = 1
        list(client.generate(session, "When? " * 100, SamplingParams(max_tokens=4)))
        assert bucket.level < -500  # a question counts, too
        client.delete_session(session)


def test_who_leaves_has_paid(front, tmp_path, engine):
    """What is taken counts though its caller's time is up, or its caller gone, before it is run."""
    file = tmp_path / "tenants.json"
    tenant = {"name": "t", "tokens": [token_hash("t")], "tokens_per_minute": 10**7}
    file.write_text(json.dumps({"tenants": [tenant]}))
    served = front(tenants=file)
    quotas, known, charged = served.gate._quotas, served.gate._tenants.authenticate("Bearer t"), list[int]()
    quotas.charge = lambda _tenant, _kind, amount: charged.append(amount)

    async def leave() -> None:
        async with aclosing(served.gate.complete(known, "Once upon a time", PARAMS)) as parts:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.3):
                    await anext(parts)

    with Client(served.grpc, token="t") as client:
        session = client.create_session().session_id
        with standing_still(engine), pytest.raises(DeadlineExceeded):
            client.upload(session, DOCUMENT, document_id="d", timeout_s=0.3)
        assert sum(charged) == client.get_session(session).processed_tokens > 0
        client.upload(session, DOCUMENT, document_id="d")
        assert sum(charged) == client.get_session(session).processed_tokens
        client.delete_session(session)
    charged.clear()
    with standing_still(engine):
        served.call(leave())
    assert sum(charged) == len(engine._model.tokenizer.encode("Once upon a time"))


def test_what_is_imported_counts(limited, engine):
    quotas, counted = limited.gate._quotas, Counter[str]()
    quotas.charge = quotas.take = lambda _tenant, kind, amount=1: counted.update({kind: amount})
    with Client(limited.grpc, token="t") as client:
        session = client.create_session().session_id
        client.upload(session, DOCUMENT, document_id="d")
        data, tokens = client.export_session(session), client.get_session(session).processed_tokens
        counted.clear()
        again = client.import_session(data).session_id
        assert (counted["bytes"], counted["tokens"]) == (len(data), tokens)
        for name in (session, again):
            client.delete_session(name)


def test_a_limit_is_told_with_a_hint_and_what_was_committed_stays(limited):
    metadata = [("authorization", "Bearer t"), ("session_id", "hinted")]
    with grpc.insecure_channel(limited.grpc) as channel:
        stubs.SessionServiceStub(channel).CreateSession(
            pb.CreateSessionRequest(session_id="hinted"), metadata=metadata, timeout=20
        )
        time.sleep(0.1)
        requests = [
            pb.UploadDocumentRequest(header=pb.DocumentHeader(session_id="hinted", document_id="d")),
            pb.UploadDocumentRequest(data=pb.DocumentData(offset=0, data=DOCUMENT[:800])),
            pb.UploadDocumentRequest(data=pb.DocumentData(offset=800, data=DOCUMENT[800:])),
        ]
        documents = stubs.DocumentServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(documents.UploadDocument(iter(requests), metadata=metadata, timeout=20))
        request = pb.GetDocumentRequest(session_id="hinted", document_id="d")
        found = documents.GetDocument(request, metadata=metadata, timeout=20).document
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = error_of(caught.value)
    assert float(error.details["retry_after_s"]) > 0.5
    assert error.details["committed_offset"] == "800"
    assert (found.committed_offset, found.finished) == (800, False)
    with Client(limited.grpc, token="t") as client:
        client.delete_session("hinted")


async def test_a_long_hint_is_heeded(monkeypatch):
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    patience = Patience()
    await patience.wait(Busy("a limit", retry_after_s=40))
    await patience.wait(Unavailable("away"))
    assert slept == [40, 0.3]
    with pytest.raises(DeadlineExceeded) as caught:
        await Patience(Deadline(1)).wait(Busy("a limit", retry_after_s=40))
    assert caught.value.details["retry_after_s"] == "40"
