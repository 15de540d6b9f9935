"""Engine replicas killed while a session uploads, prefills, refreshes and decodes: nothing is lost, no token differs.

The client knows of nothing: its calls are the same as for an undisturbed session.
"""

from __future__ import annotations

import io
import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from segcore.sampling import SamplingParams
from services.serving.client import Client
from services.serving.config import ServeConfig
from services.serving.messages import UploadAck

pytestmark = pytest.mark.e2e

DOCUMENT = "".join(f"Entry {i}: the café at № {i * 7919 % 10007} opens at {i % 24} o'clock.\n" for i in range(100))
QUESTION = "When does the café open?"
GREEDY = SamplingParams(max_tokens=120, stop=("ÿ",))
SAMPLED = SamplingParams(max_tokens=120, stop=("ÿ",), temperature=1.0, seed=10)


def worker_of(config: ServeConfig, session_id: str) -> int:
    """The process that wrote the session last, or writes it now."""
    with sqlite3.connect(config.sessions) as db:
        owner = db.execute("SELECT owner FROM sessions WHERE id = ?", (session_id,)).fetchone()[0]
    db.close()
    return int(owner.split(":")[1])


class Killer:
    """Kills the session's replica when a moment has come; once each."""

    def __init__(self, config: ServeConfig, session_id: str) -> None:
        self._config, self._session_id = config, session_id
        self.killed: list[int] = []

    def __call__(self) -> None:
        pid = worker_of(self._config, self._session_id)
        if pid not in self.killed and Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
            self.killed.append(pid)


def run(client: Client, session: str, moments: dict[str, Callable[[], None]]) -> list[str]:
    """A document and two answers; `moments` are called in the middle of things, and change nothing."""

    def at(moment: str) -> None:
        moments.pop(moment, lambda: None)()

    class Source(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            if not data:
                at("before the finish")
            return data

    def progress(ack: UploadAck) -> None:
        if ack.committed_offset > len(DOCUMENT) // 2:
            at("in the upload")

    client.upload(session, Source(DOCUMENT.encode()), on_progress=progress)
    texts = []
    for params in (GREEDY, SAMPLED):
        at(f"before answer {len(texts)}")
        text = ""
        for part in client.generate(session, QUESTION, params):
            text += part.text
            at(f"in answer {len(texts)}")
        texts.append(text)
    return texts


MOMENTS = ["in the upload", "before the finish", "before answer 0", "in answer 0", "in answer 1"]


def test_a_killed_replica_costs_no_session_and_no_token(client, config, tell):
    undisturbed = client.create_session().session_id
    expected = run(client, undisturbed, {})
    assert all(len(text) > 20 for text in expected)
    session = client.create_session().session_id
    killer = Killer(config, session)
    assert run(client, session, dict.fromkeys(MOMENTS, killer)) == expected
    assert len(killer.killed) >= 4
    info, other = client.get_session(session), client.get_session(undisturbed)
    assert (info.points, info.documents[0].finished) == (other.points, True)
    tell(f"engines killed {len(killer.killed)} times in a session's upload and answers: 0 sessions, 0 tokens lost")
    for name in (session, undisturbed):
        client.delete_session(name)
