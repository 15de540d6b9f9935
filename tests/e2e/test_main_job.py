"""The main job, through everything that is real: stream a document in, ask, and watch the answer stream out."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest

import segcore
from protos.gen.segcore.v1 import segcore_pb2 as pb
from protos.gen.segcore.v1 import segcore_pb2_grpc as stubs
from segcore.errors import AlreadyExists, FailedPrecondition
from segcore.sampling import SamplingParams
from services.cli import main
from services.serving.client import AsyncClient, Client
from services.serving.config import ServeConfig
from services.serving.messages import UploadAck
from services.serving.session import Sessions

pytestmark = pytest.mark.e2e

# Some 8,300 tokens of the byte tokenizer: 129 segments. Multi-byte characters fall on message borders somewhere.
DOCUMENT = "".join(f"Entry {i}: the café at № {i * 7919 % 10007} opens at {i % 24} o'clock.\n" for i in range(170))
QUESTION = "When does the café open?"
PARAMS = SamplingParams(max_tokens=24, stop=("ÿ",))


def answer(client: Client, session_id: str, question: str = QUESTION, params: SamplingParams = PARAMS) -> str:
    return "".join(part.text for part in client.generate(session_id, question, params))


@pytest.fixture(scope="module")
def unbroken_answer(config: ServeConfig) -> str:
    """The answer without a service: the same sessions on an engine in this process."""

    async def ask() -> str:
        model = segcore.load_model(config.model, dtype=config.dtype, device=config.device)
        engine = segcore.Engine(model.lm, config.engine_config())
        sessions = Sessions(model, engine, config)
        await sessions.create("", "s", "")
        await sessions.open_document("", "s", "d", None)
        data = DOCUMENT.encode()
        for offset in range(0, len(data), 1000):
            await sessions.append("", "s", "d", offset, data[offset : offset + 1000])
        await sessions.finish("", "s", "d", len(data), hashlib.sha256(data).digest())
        text = "".join([part.text async for part in sessions.generate("", "s", QUESTION, PARAMS)])
        engine.shutdown()
        return text

    return asyncio.run(ask())


def test_the_service_answers_as_the_engine_does(client, session, unbroken_answer):
    acks: list[UploadAck] = []
    last = client.upload(session, DOCUMENT, on_progress=acks.append)
    assert last.finished
    assert last.committed_offset == len(DOCUMENT.encode())
    assert last.progress.pending_tokens == 0
    parts = list(client.generate(session, QUESTION, PARAMS))
    assert "".join(part.text for part in parts) == unbroken_answer
    assert unbroken_answer
    assert parts[-1].finish_reason in ("stop", "length")
    assert parts[-1].prompt_tokens > last.progress.processed_tokens > 8000
    info = client.get_session(session)
    assert info.segments == info.processed_tokens // 64
    assert [document.finished for document in info.documents] == [True]
    # Prefill went on while the document arrived, and the past went to disk.
    assert [ack for ack in acks if ack.progress.segments > 20 and not ack.finished]
    assert last.progress.past_disk_bytes > 0


@pytest.mark.parametrize("size", [1, 977])
def test_the_answer_does_not_depend_on_how_the_document_arrives(client, session, unbroken_answer, size):
    class Dribble(io.BytesIO):
        def read(self, wanted=-1):
            return super().read(min(wanted, size))

    document = DOCUMENT if size > 1 else DOCUMENT[:150]
    client.upload(session, Dribble(document.encode()))
    if size > 1:
        assert answer(client, session) == unbroken_answer
    else:
        other = client.create_session().session_id
        client.upload(other, document)
        assert answer(client, session) == answer(client, other)
        client.delete_session(other)


def test_two_sessions_answer_as_if_alone(address, unbroken_answer):
    async def ask(client: AsyncClient) -> str:
        session = await client.create_session()
        await client.upload(session.session_id, DOCUMENT)
        text = "".join([part.text async for part in client.generate(session.session_id, QUESTION, PARAMS)])
        await client.delete_session(session.session_id)
        return text

    async def both() -> list[str]:
        async with AsyncClient(address) as client:
            return await asyncio.gather(*(ask(client) for _ in range(3)))

    assert asyncio.run(both()) == [unbroken_answer] * 3


def test_sampled_answers_repeat_with_their_seed(client, session):
    client.upload(session, DOCUMENT[:3000])
    texts = []
    for seed in (1, 1, 2):
        other = client.create_session().session_id
        client.upload(other, DOCUMENT[:3000])
        texts.append(answer(client, other, params=SamplingParams(max_tokens=16, temperature=1.0, seed=seed)))
        client.delete_session(other)
    assert texts[0] == texts[1] != texts[2]


def test_several_documents_and_questions_in_one_session(client, session):
    client.upload(session, DOCUMENT[:2000])
    client.upload(session, DOCUMENT[2000:4000], document_id="second")
    first = answer(client, session)
    tokens = client.get_session(session).processed_tokens
    client.upload(session, "A postscript.")
    assert answer(client, session, "And then?")
    assert client.get_session(session).processed_tokens > tokens
    assert first


UPLOADER = """
import sys, time
from pathlib import Path
from services.serving.client import Client

class Slow:
    def __init__(self, path): self.file = open(path, "rb")
    def read(self, size):
        time.sleep(0.05)
        return self.file.read(min(size, 300))

address, session, path = sys.argv[1:]
with Client(address) as client:
    show = lambda ack: print(ack.committed_offset, flush=True)
    client.upload(session, Slow(path), document_id="doc", on_progress=show)
"""


def test_a_killed_client_resumes_where_it_was_and_gets_the_same_answer(
    client, session, address, tmp_path, unbroken_answer
):
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT)
    command = [sys.executable, "-c", UPLOADER, address, session, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as uploader:
        assert uploader.stdout is not None
        for line in uploader.stdout:
            if int(line) > len(DOCUMENT) // 3:
                uploader.send_signal(signal.SIGKILL)
                break
    committed = client.get_document(session, "doc").committed_offset
    assert len(DOCUMENT) // 3 < committed < len(DOCUMENT)
    with pytest.raises(FailedPrecondition, match="still open"):
        answer(client, session)
    # A new client begins at the document's start; the service says where to go on.
    client.upload(session, path, document_id="doc")
    assert answer(client, session) == unbroken_answer


@asynccontextmanager
async def cutting_proxy(address: str, cut_after: list[int]) -> AsyncIterator[str]:
    """A TCP proxy that cuts its nth connection after cut_after[n] bytes from the client; later ones stay whole."""
    host, port = address.split(":")
    budgets, pipes = iter(cut_after), set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: int) -> None:
        while budget > 0 and (data := await reader.read(512)):
            budget -= len(data)
            writer.write(data)
            await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(host, int(port))
        ways = [pump(reader, there_writer, next(budgets, 10**9)), pump(there_reader, writer, 10**9)]
        tasks = {asyncio.create_task(way) for way in ways}
        pipes.update(tasks)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for end in (writer, there_writer):
            end.transport.abort()
            with suppress(OSError):
                await end.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in pipes:
            task.cancel()
        await asyncio.gather(*pipes, return_exceptions=True)
        await asyncio.sleep(0.1)  # for `serve` to close what it opened


def test_broken_connections_are_taken_up_by_the_client(address, session, client, unbroken_answer):
    expected = {"expected_generation": client.get_session(session).generation}  # at the beginning only

    async def upload() -> UploadAck:
        async with cutting_proxy(address, [3000, 6000, 1500]) as proxy, AsyncClient(proxy) as through_proxy:
            return await through_proxy.upload(session, io.BytesIO(DOCUMENT.encode()), document_id="doc", **expected)

    assert asyncio.run(upload()).finished
    assert client.get_document(session, "doc").committed_offset == len(DOCUMENT.encode())
    assert answer(client, session) == unbroken_answer


def test_an_uploaded_document_is_not_uploaded_again(client, session):
    client.upload(session, "Once.", document_id="doc")
    with pytest.raises(AlreadyExists, match="already uploaded"):
        client.upload(session, "Once.", document_id="doc")


def test_a_client_that_leaves_mid_answer_leaves_a_usable_session(client, session):
    client.upload(session, DOCUMENT[:1000])
    parts = client.generate(session, QUESTION, SamplingParams(max_tokens=100_000))
    next(parts)
    parts.close()
    assert answer(client, session, "Still there?")


def test_the_answer_of_a_client_that_vanished_can_be_ended_by_another(address, client, session):
    client.upload(session, DOCUMENT[:1000])
    request = pb.GenerateRequest(session_id=session, question=QUESTION, sampling=pb.SamplingParams(max_tokens=10_000))
    with grpc.insecure_channel(address) as channel:
        next(stubs.GenerationServiceStub(channel).Generate(request, metadata=[("session_id", session)]))
    client.cancel_answer(session)
    assert answer(client, session, "Still there?")
    client.cancel_answer(session)  # nothing to end: no error


def test_the_command_asks_a_running_service(address, tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "services.cli", "ask", "-", QUESTION, "--address", address]
    command += ["--max-tokens", "8", "--figures", str(figures)]
    done = subprocess.run(command, input=DOCUMENT[:4000], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "engine memory at the end" in done.stderr
    written = json.loads(figures.read_text())
    assert written["document_bytes"] == len(DOCUMENT[:4000].encode())
    assert written["answers"][0]["answer_tokens"] == 8


def test_the_command_says_what_is_wrong(address, tmp_path, capsys):
    binary, note = tmp_path / "zeros", tmp_path / "note.txt"
    binary.write_bytes(bytes(1000))
    note.write_text("A note.")
    for arguments, message in [
        (("ask", str(binary), "What?", "--address", address), "NUL"),
        (("ask", str(tmp_path / "absent.txt"), "What?", "--address", address), "No such file"),
        (("ask", str(note), " ", "--address", address), "question is empty"),
        (("ask", str(note), "What?", "--address", address, "--temperature", "-1"), "temperature"),
        (("serve", "--config", str(Path(__file__).parent / "absent.yaml")), "absent.yaml"),
    ]:
        assert main(arguments) == 1, arguments
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said
