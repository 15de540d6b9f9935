"""Fewer engines, and more again, while clients upload and ask: nothing is lost, and no token differs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from segcore.errors import SegcoreError
from segcore.sampling import SamplingParams
from services.serving.client import Client
from services.serving.config import ServeConfig
from services.serving.local import scale

pytestmark = pytest.mark.e2e

CLIENTS = 3
DOCUMENT = "".join(f"Entry {i}: the café at № {i * 7919 % 10007} opens at {i % 24} o'clock.\n" for i in range(40))
ANSWERS = (
    SamplingParams(max_tokens=60, stop=("ÿ",)),
    SamplingParams(max_tokens=60, stop=("ÿ",), temperature=1.0, seed=3),
)
REPLICAS = 3
WAIT_S = 200.0


def until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.1)


class Load:
    """Clients that begin, fill, ask and delete sessions until it is over."""

    def __init__(self, address: str) -> None:
        self._address, self._over = address, threading.Event()
        self.counts: Counter[str] = Counter(dict.fromkeys(("sessions", "lost", "different"), 0))
        self.faults: list[str] = []
        with Client(address) as client:
            self._expected = self._session(client)
        self._threads = [threading.Thread(target=self._work) for _ in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(WAIT_S)

    def some_more(self) -> None:
        """Wait until every client may have begun and ended a session."""
        wanted = self.counts["sessions"] + 2 * CLIENTS
        until(lambda: self.counts["sessions"] >= wanted or bool(self.faults))

    def _work(self) -> None:
        with Client(self._address) as client:
            while not self._over.is_set():
                try:
                    self.counts["different"] += self._session(client) != self._expected
                    self.counts["sessions"] += 1
                except SegcoreError as error:
                    self.counts["lost"] += 1
                    self.faults.append(f"{type(error).__name__}: {error}")

    @staticmethod
    def _session(client: Client) -> list[str]:
        name = client.create_session().session_id
        client.upload(name, DOCUMENT)
        texts = ["".join(part.text for part in client.generate(name, "When?", params)) for params in ANSWERS]
        client.delete_session(name)
        return texts


@pytest.fixture
def scaled_back(config: ServeConfig) -> Iterator[None]:
    yield
    scale(config.replicas, WAIT_S)


@pytest.mark.usefixtures("scaled_back")
def test_fewer_engines_and_more_again_lose_nothing(address, client, tell):
    with Load(address) as load:
        for replicas in (REPLICAS, 1, REPLICAS):
            scale(replicas, WAIT_S)
            load.some_more()
    tell(f"{REPLICAS} -> 1 -> {REPLICAS} engines under {CLIENTS} clients: {dict(load.counts)}")
    assert load.faults == []
    assert load.counts["different"] == load.counts["lost"] == 0
    assert not [info for info in client.list_sessions() if info.answering]
