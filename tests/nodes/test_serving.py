"""A service over several nodes, one of which dies, or is cut off and returns, while everybody is answered."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import NamedTuple

import pytest

from segcore.sampling import SamplingParams
from services.serving.client import Client
from services.serving.config import ServeConfig
from services.serving.local import local_service
from tests.nodes.conftest import Nodes, running_engines
from tests.services.cluster import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

DOCUMENT = "".join(f"Entry {i}: the café at № {i * 7919 % 10007} opens at {i % 24} o'clock.\n" for i in range(30))
QUESTION = "When does the café open?"
LONG = SamplingParams(max_tokens=1500)
SHORT = SamplingParams(max_tokens=16)
WAIT_S = 120


class Service(NamedTuple):
    client: Client
    config: ServeConfig
    nodes: Nodes

    def node_of(self, session_id: str) -> int:
        """Where the session was written last, or is written now."""
        with closing(sqlite3.connect(self.config.sessions)) as db:
            (owner,) = db.execute("SELECT owner FROM sessions WHERE id = ?", (session_id,)).fetchone()
        return self.nodes.of(int(owner.split(":")[1]))

    def sessions_on_both_nodes(self) -> dict[str, int]:
        """Uploaded sessions, and where they are, once there is an engine on each: one may have just been lost."""
        wait_for(lambda: running_engines() == self.config.replicas)
        made: dict[str, int] = {}
        while len(made) < 4 or len(set(made.values())) < 2:
            session = self.client.create_session().session_id
            self.client.upload(session, DOCUMENT)
            made[session] = self.node_of(session)
            assert len(made) < 24, "engines share a node, or sessions all go to one"
        return made

    def ask(self, session_id: str, params: SamplingParams, begun: threading.Event | None = None) -> str:
        text = ""
        for part in self.client.generate(session_id, QUESTION, params):
            text += part.text
            if begun is not None:
                begun.set()
        return text

    @contextmanager
    def everybody_asking(self, sessions: Sequence[str]) -> Iterator[list[Future[str]]]:
        """Long answers to all at once; within, each has begun."""
        begun = [threading.Event() for _ in sessions]
        with ThreadPoolExecutor(len(sessions)) as threads:
            asked = [
                threads.submit(self.ask, *each) for each in zip(sessions, [LONG] * len(sessions), begun, strict=True)
            ]
            assert all(event.wait(WAIT_S) for event in begun)
            yield asked


@pytest.fixture(scope="module")
def served(nodes: Nodes, service: ServeConfig) -> Iterator[Service]:
    with local_service(service) as address, Client(address) as client:
        yield Service(client, service, nodes)


@pytest.fixture(scope="module")
def expected(served: Service) -> list[str]:
    """What a session answers that nobody disturbs: a long answer, then a short one."""
    session = served.client.create_session().session_id
    served.client.upload(session, DOCUMENT)
    return [served.ask(session, LONG), served.ask(session, SHORT)]


def test_a_node_that_dies_takes_nothing_with_it(served, expected):
    sessions = served.sessions_on_both_nodes()
    dies = sessions[next(iter(sessions))]
    with served.everybody_asking([*sessions]) as asked:
        served.nodes.kill(dies)
        answers = [future.result(WAIT_S) for future in asked]
    assert answers == [expected[0]] * len(sessions)  # to the last token, wherever they were
    assert [served.ask(session, SHORT) for session in sessions] == [expected[1]] * len(sessions)


def test_a_node_that_was_cut_off_finds_that_others_have_gone_on(served, expected):
    """It returns with leases that it believes in and answers half made: none of that may be written."""
    sessions = served.sessions_on_both_nodes()
    lost = sessions[next(iter(sessions))]
    with served.everybody_asking([*sessions]) as asked:
        with served.nodes.stopped(lost):
            answers = [future.result(WAIT_S) for future in asked]
            points = [served.client.get_session(session).points for session in sessions]
        time.sleep(2 * served.config.lease_s)
    assert answers == [expected[0]] * len(sessions)
    assert [served.client.get_session(session).points for session in sessions] == points
    served.nodes.replace(lost)
    assert [served.ask(session, SHORT) for session in sessions] == [expected[1]] * len(sessions)
