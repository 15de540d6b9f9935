"""The front on a real Ray: the official OpenAI client, Serve's own proxy beside it, and what Prometheus reads."""

from __future__ import annotations

import time
import urllib.request

import openai
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
    client.upload(session, "A text about streams of tokens.")
    list(client.generate(session, "What?", SamplingParams(max_tokens=4)))
    port = ray.nodes()[0]["MetricsExportPort"]
    wanted = {exported("segcore_requests"), exported("segcore_past_bytes"), "ray_segcore_first_token_seconds_bucket"}
    text, ends = "", time.monotonic() + 90
    while not all(name in text for name in wanted) and time.monotonic() < ends:
        time.sleep(2)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as response:
            text = response.read().decode()
    assert {name for name in wanted if name not in text} == set(), sorted(
        {line.split("{")[0] for line in text.splitlines() if "segcore" in line}
    )
