"""A service over several nodes, one of which dies while everybody is answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
from ray import serve

from segcore.errors import SegcoreError, Unavailable
from segcore.sampling import SamplingParams
from services.serving.app import APPLICATION
from services.serving.client import Client
from services.serving.config import AutoscalingSettings
from services.serving.local import local_service

T = TypeVar("T")

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

DOCUMENT = "".join(f"Entry {i}: the café at № {i * 7919 % 10007} opens at {i % 24} o'clock.\n" for i in range(30))
QUESTION = "When does the café open?"
LONG = SamplingParams(max_tokens=2000)
SHORT = SamplingParams(max_tokens=16)


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


def patiently(call: Callable[[], T], seconds: float = 60) -> T:
    """What a call returns once its engine can be reached again."""
    until = time.monotonic() + seconds
    while True:
        try:
            return call()
        except Unavailable:
            assert time.monotonic() < until
            time.sleep(0.2)


def test_a_node_that_dies_takes_no_session_with_it(nodes, service):
    with local_service(service) as address, Client(address) as client:
        sessions = sessions_on_both_nodes(client)
        begun = [threading.Event() for _ in sessions]
        with ThreadPoolExecutor(len(sessions)) as threads:
            asked = [threads.submit(answer, client, s, LONG, b) for s, b in zip(sessions, begun, strict=True)]
            assert all(event.wait(60) for event in begun)
            there = sessions_on_the_replica_of(sessions[0])
            nodes.replace(0)
            answers = [future.result(90) for future in asked]
        whole = [told for told in answers if isinstance(told, str)]
        assert all(isinstance(told, str | Unavailable) for told in answers)
        assert min(there, len(sessions) - there) <= len(whole)  # those of the other node at least
        assert len(set(whole)) == 1  # to the last token
        for session in sessions:
            assert patiently(lambda session=session: client.get_session(session)).documents[0].finished
            assert isinstance(patiently(lambda session=session: asked_again(client, session)), str)


def asked_again(client: Client, session_id: str) -> str:
    return "".join(part.text for part in client.generate(session_id, QUESTION, SHORT))


def running_engines() -> int:
    return serve.status().applications[APPLICATION].deployments["engine"].replica_states.get("RUNNING", 0)


def wait_for(engines: int, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while running_engines() != engines:
        assert time.monotonic() < until, f"{running_engines()} engines"
        time.sleep(0.1)


def test_engines_come_with_load_and_go_without(nodes, service):
    """By what engines have to do: a request that is merely open, an upload whose source dawdles, brings none."""
    quick = AutoscalingSettings(max_replicas=2, look_back_s=1.5, upscale_delay_s=0.5, downscale_delay_s=3)
    config = service.model_copy(update={"replicas": 1, "autoscaling": quick})
    with local_service(config) as address, Client(address) as client:
        assert running_engines() == 1
        made = [client.create_session().session_id for _ in range(6)]
        for session in made:
            client.upload(session, DOCUMENT[:200])
        stop = threading.Event()

        def ask(session: str) -> None:
            while not stop.is_set():
                answer(client, session, LONG, threading.Event())

        with ThreadPoolExecutor(len(made)) as threads:
            for session in made:
                threads.submit(ask, session)
            wait_for(2)
            stop.set()
        wait_for(1)
        assert all(isinstance(patiently(lambda s=s: asked_again(client, s)), str) for s in made)  # there and back again
