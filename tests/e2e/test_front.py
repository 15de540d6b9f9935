"""The front on a real Ray: the official OpenAI client, Serve's own proxy beside it, and what Prometheus reads."""

from __future__ import annotations

import os
import signal
import time
import urllib.request

import openai
import psutil
import pytest
import ray

from segcore.errors import NotFound
from segcore.sampling import SamplingParams
from services.serving.client import Client
from services.serving.metrics import exported

pytestmark = pytest.mark.e2e


def test_the_official_openai_client_asks_and_streams(address, config):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{config.http_port}/v1", api_key="x", max_retries=0) as client:
        model = next(iter(client.models.list())).id
        asked = {"model": model, "messages": [{"role": "user", "content": "What?"}], "max_tokens": 8, "temperature": 0}
        whole = client.chat.completions.create(logprobs=True, top_logprobs=2, **asked)
        chunks = client.chat.completions.create(stream=True, **asked)
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
        assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
        assert client.completions.create(model=model, prompt="Once", max_tokens=4, seed=1).usage.completion_tokens <= 4
        with pytest.raises(openai.BadRequestError, match="no such key"):
            client.chat.completions.create(extra_body={"frobnicate": 1}, **asked)


def test_both_faces_see_one_session(address, config, client, session):
    client.upload(session, "A text about streams of tokens. " * 20)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{config.http_port}/v1", api_key="x", max_retries=0) as http:
        model = next(iter(http.models.list())).id
        answer = http.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What?"}],
            max_tokens=4,
            extra_body={"session_id": session},
        )
    assert answer.usage.prompt_tokens > 400
    assert client.get_session(session).processed_tokens > answer.usage.prompt_tokens


def test_serves_own_proxy_is_a_way_in_too(address, config):
    with Client(f"127.0.0.1:{config.serve_grpc_port}") as client:
        session = client.create_session().session_id
        client.upload(session, "A text about streams of tokens.")
        assert list(client.generate(session, "What?", SamplingParams(max_tokens=4)))
        client.delete_session(session)
        with pytest.raises(NotFound):
            client.get_session(session)


def test_prometheus_finds_our_metrics(address, client, session):
    client.upload(session, "A text about streams of tokens. " * 40)  # long enough for the index to miss some
    list(client.generate(session, "What?", SamplingParams(max_tokens=4)))
    port = ray.nodes()[0]["MetricsExportPort"]
    wanted = {exported(name) for name in ("segcore_requests", "segcore_past_bytes", "segcore_index_tokens")}
    wanted.add("ray_segcore_first_token_seconds_bucket")
    text, ends = "", time.monotonic() + 90
    while not all(name in text for name in wanted) and time.monotonic() < ends:
        time.sleep(2)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as response:
            text = response.read().decode()
    assert {name for name in wanted if name not in text} == set(), sorted(
        {line.split("{")[0] for line in text.splitlines() if "segcore" in line}
    )


def fronts_of(port: int, *states: str) -> set[int]:
    """The processes that hold a port."""
    held = psutil.net_connections("tcp")
    return {c.pid for c in held if c.laddr and c.laddr.port == port and c.status in states and c.pid is not None}


def kill_our_front(port: int) -> set[int]:
    """SIGKILL for the front that this process is connected to, of the two that share the port; returns it."""
    killed = fronts_of(port, psutil.CONN_ESTABLISHED) - {os.getpid()}
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    return killed


def two_fronts_listen(port: int) -> None:
    ends = time.monotonic() + 60
    while len(fronts_of(port, psutil.CONN_LISTEN)) < 2:
        assert time.monotonic() < ends
        time.sleep(0.1)


def test_a_front_killed_in_an_upload_costs_no_byte_and_doubles_none(address, client, session, tell):
    """The client's call is the same as for an undisturbed session, and goes on by itself."""
    document, port = "Entry: the café at № 7 opens at 9 o'clock.\n" * 120, int(address.split(":")[1])
    undisturbed = client.create_session().session_id
    client.upload(undisturbed, document)
    two_fronts_listen(port)
    killed: set[int] = set()

    def on_progress(ack):
        if not killed and ack.committed_offset > len(document) // 3:
            assert not ack.finished
            killed.update(kill_our_front(port))

    ack = client.upload(session, document, document_id="document", on_progress=on_progress)
    assert killed
    assert ack.committed_offset == len(document.encode())
    info, other = client.get_session(session), client.get_session(undisturbed)
    assert (info.points, info.processed_tokens) == (other.points, other.processed_tokens)
    texts = ["".join(part.text for part in client.generate(name, "When?")) for name in (session, undisturbed)]
    assert texts[0] == texts[1]
    tell("a front killed in an upload: 0 bytes lost, 0 twice")
    client.delete_session(undisturbed)


def test_a_killed_front_costs_no_token(address, config, client, session, tell):
    """Two fronts share the port; the one that the client is connected to is killed in the middle of an answer."""
    client.upload(session, "A text about streams of tokens. " * 20)
    params = SamplingParams(max_tokens=60, stop=("\u00ff",))
    twin = client.fork_session(session).session_id
    expected = "".join(part.text for part in client.generate(twin, "What?", params))
    client.delete_session(twin)
    port = int(address.split(":")[1])
    two_fronts_listen(port)
    text = ""
    for part in client.generate(session, "What?", params):
        if not text and part.text:
            assert kill_our_front(port)
        text += part.text
    assert text == expected
    tell("a front killed in an answer: 0 tokens lost, 0 twice")
