"""Engines and their nodes come with load and go without it; sessions go with them, in both directions."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray

from segcore.sampling import SamplingParams
from services.serving.client import Client
from services.serving.config import AutoscalingSettings
from services.serving.local import local_service
from tests.nodes.conftest import running_engines

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

DOCUMENT = "".join(f"Entry {i}: the café at № {i * 7919 % 10007} opens at {i % 24} o'clock.\n" for i in range(5))
QUESTION = "When does the café open?"
PARAMS = SamplingParams(max_tokens=300)
WAIT_S = 180


def engine_nodes() -> int:
    return sum(node["Alive"] and "engine" in node["Resources"] for node in ray.nodes())


def wait_for(engines: int) -> None:
    """So many engines, on as many nodes."""
    until = time.monotonic() + WAIT_S
    while (running_engines(), engine_nodes()) != (engines, engines):
        assert time.monotonic() < until, f"{running_engines()} engines, {engine_nodes()} nodes"
        time.sleep(0.2)


def test_engines_and_nodes_come_with_load_and_go_without(growing, service):
    quick = AutoscalingSettings(max_replicas=2, look_back_s=1.5, upscale_delay_s=0.5, downscale_delay_s=3)
    config = service.model_copy(update={"replicas": 1, "autoscaling": quick})
    assert engine_nodes() == 0
    with local_service(config) as address, Client(address) as client:
        wait_for(1)
        answers: dict[str, list[str]] = {client.create_session().session_id: [] for _ in range(6)}
        for session in answers:
            client.upload(session, DOCUMENT)
        enough = threading.Event()

        def ask(session: str) -> None:
            answers[session].append("".join(part.text for part in client.generate(session, QUESTION, PARAMS)))

        def go_on(session: str) -> None:
            while not enough.is_set():
                ask(session)

        with ThreadPoolExecutor(len(answers)) as threads:
            asking = [threads.submit(go_on, session) for session in answers]
            try:
                wait_for(2)
            finally:
                enough.set()
            assert not [future.exception() for future in asking if future.exception()]
        wait_for(1)
        most = 1 + max(len(told) for told in answers.values())
        for session, told in answers.items():
            while len(told) < most:
                ask(session)
        assert len({tuple(told) for told in answers.values()}) == 1  # whichever engines they were on, and when
