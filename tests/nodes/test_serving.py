"""A service over several nodes, one of which dies while everybody is answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ray import serve

from segcore.errors import NotFound, SegcoreError, Unavailable
from segcore.sampling import SamplingParams
from services.serving.app import APPLICATION
from services.serving.client import Client
from services.serving.config import ServeConfig
from services.serving.local import local_service
from tests.conftest import SERVED_SEGMENT

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

DOCUMENT = "".join(f"Entry {i}: the café at № {i * 7919 % 10007} opens at {i % 24} o'clock.\n" for i in range(30))
QUESTION = "When does the café open?"
LONG = SamplingParams(max_tokens=2000)
SHORT = SamplingParams(max_tokens=16)


@pytest.fixture(scope="module")
def address(nodes, model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = ServeConfig(
        model=str(model_directory),
        dtype="float32",
        device="cpu",
        threads=1,
        segment=SERVED_SEGMENT,
        chunk_tokens=64,
        replicas=2,
        front_resources={"front": 1},
        engine_resources={"engine": 1},
        grpc_port=0,
        http_port=0,
        past_directory=tmp_path_factory.mktemp("past-kv"),
        max_sessions=32,
    )
    with local_service(config) as where:
        yield where


def sessions_on_the_replica_of(session_id: str) -> int:
    engine = serve.get_deployment_handle("engine", APPLICATION).options(session_id=session_id)
    return engine.record_autoscaling_stats.remote().result()["sessions"]


def sessions_on_both_nodes(client: Client) -> list[str]:
    """Uploaded sessions, some on each node."""
    made: list[str] = []
    while not made or sessions_on_the_replica_of(made[0]) == len(made):
        made.append(client.create_session().session_id)
        client.upload(made[-1], DOCUMENT)
        assert len(made) < 20, "engines share a node, or sessions all go to one"
    return made


def answer(client: Client, session_id: str, params: SamplingParams, begun: threading.Event) -> str | SegcoreError:
    text = ""
    try:
        for part in client.generate(session_id, QUESTION, params):
            text += part.text
            begun.set()
    except SegcoreError as error:
        return error
    return text


def eventually(client: Client, seconds: float = 60) -> str:
    """A new session, once there is an engine for it again."""
    until = time.monotonic() + seconds
    while True:
        try:
            made = client.create_session().session_id
            client.upload(made, DOCUMENT)
            return made
        except Unavailable:
            assert time.monotonic() < until
            time.sleep(0.2)


def test_a_node_that_dies_takes_its_own_sessions_and_no_others(nodes, address):
    with Client(address) as client:
        sessions = sessions_on_both_nodes(client)
        begun = [threading.Event() for _ in sessions]
        with ThreadPoolExecutor(len(sessions)) as threads:
            asked = [threads.submit(answer, client, s, LONG, b) for s, b in zip(sessions, begun, strict=True)]
            assert all(event.wait(60) for event in begun)
            nodes.replace(0)
            answers = [future.result(60) for future in asked]
        lost = {s for s, told in zip(sessions, answers, strict=True) if isinstance(told, SegcoreError)}
        assert 0 < len(lost) < len(sessions)
        assert all(isinstance(told, str | Unavailable) for told in answers)
        assert len({told for told in answers if isinstance(told, str)}) == 1  # to the last token
        news = [eventually(client) for _ in range(4)]
        assert len({answer(client, session, SHORT, begun[0]) for session in news}) == 1
        for session in sessions:
            if session in lost:
                with pytest.raises(NotFound):
                    client.get_session(session)
