"""SIGKILL of a replica while it writes, prefills, refreshes, decodes and stores blocks: nothing is lost."""

from __future__ import annotations

import multiprocessing
import random
import signal
from collections import Counter
from pathlib import Path

import pytest

from services.serving.config import ServeConfig
from tests.services.serving import killed
from tests.services.serving.conftest import DOCUMENT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = 20
DOCUMENTS = [DOCUMENT, DOCUMENT.replace(b"Entry", b"Place")]
Answers = dict[str, list[str]]


class Client:
    """What a client has of its sessions' answers. One replica at a time works on them; the next goes on."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        # Processes come from one that has imported everything, and has no threads.
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload([killed.__name__])

    def begin(self, *names: str) -> None:
        """Sessions of these names, and past KV that nobody has made before."""
        shared = {"past_shared": f"{self._config.past_shared}-{names[0]}"}
        self._config_now = self._config.model_copy(update=shared)
        self.texts: Answers = {name: ["" for _ in killed.ANSWERS] for name in names}
        self._known = {name: [0 for _ in killed.ANSWERS] for name in names}
        self._whole: set[tuple[str, int]] = set()

    def run(self, kill: tuple[str, int] | None = None) -> bool:
        """Let a replica work until it is killed, or done; whether it was killed."""
        pipe, theirs = self._processes.Pipe(duplex=False)
        jobs = {name: (DOCUMENTS[i], self._known[name]) for i, name in enumerate(self.texts)}
        process = self._processes.Process(target=killed.replica, args=(theirs, self._config_now, jobs, kill))
        process.start()
        theirs.close()
        while True:
            try:
                name, answer, text, tokens, whole = pipe.recv()
            except EOFError:
                break
            if (name, answer) not in self._whole:  # one that is whole is told again, as far as it lacks: its end
                self.texts[name][answer] += text
                self._known[name][answer] = tokens
                self._whole |= {(name, answer)} if whole else set()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0


@pytest.fixture
def client(config: ServeConfig, tmp_path: Path) -> Client:
    return Client(config.model_copy(update={"lease_s": 0.2}))


def test_twenty_kills_cost_no_session_and_no_token(client, tell):
    client.begin("undisturbed-0", "undisturbed-1")
    assert not client.run()
    expected = list(client.texts.values())
    assert all(text for texts in expected for text in texts), expected
    chance, kills, sessions, different = random.Random(5), Counter[str](), 0, 0
    while kills.total() < KILLS:
        client.begin(f"s{sessions}", f"s{sessions + 1}")
        moment = chance.choice([*killed.MOMENTS])
        while client.run((moment, chance.randint(1, 25))):
            kills[moment] += 1
            # Each kind in turn, the rarest next, until there were enough.
            moment = min(killed.MOMENTS, key=lambda m: (kills[m], chance.random()))
            if kills.total() >= KILLS:
                assert not client.run()
                break
        sessions += 2
        different += sum(texts != wanted for texts, wanted in zip(client.texts.values(), expected, strict=True))
    tell(f"{sessions} sessions, killed {dict(kills)}: lost 0 sessions, {different} with another token")
    assert different == 0
    assert kills.keys() == killed.MOMENTS.keys()
