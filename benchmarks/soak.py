"""A service under load whose engine replicas are killed at random, and scaled 3 -> 1 -> 3: what was lost? Zero.

.venv/bin/python -m benchmarks.soak [--minutes 20] [--clients 4] [--replicas 3] [--sessions redis://...] [--model DIR]

Clients upload documents of several lengths and ask, greedy and sampled, over and over; every text is held against
that of the first, undisturbed run. Ends with status 1 if a session, a byte or a token was lost, or the service has
grown.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from pydoc_data import topics

import psutil

from segcore.errors import SegcoreError
from segcore.sampling import SamplingParams
from services.serving.client import Client
from services.serving.config import ServeConfig
from services.serving.local import local_service

TEXT = "\n\n".join(topics.topics.values())
LENGTHS = (500, 6_000, 20_000)
QUESTION = "What is the assert statement used for?"
ANSWERS = (SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, temperature=1.0, seed=7))
KILL_EVERY_S = (5.0, 20.0)
# The service's processes may take this much more at the end than when every kind of work had been done once.
MOST_GROWTH = 1.25


def job(client: Client, length: int) -> list[str]:
    """A session's whole life; its answers."""
    session = client.create_session().session_id
    client.upload(session, TEXT[:length])
    texts = ["".join(part.text for part in client.generate(session, QUESTION, params)) for params in ANSWERS]
    assert client.get_session(session).documents[0].committed_offset == len(TEXT[:length].encode())
    client.delete_session(session)
    return texts


def engines() -> list[psutil.Process]:
    """The engine tier's processes."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ServeReplica:segcore:engine" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Soak:
    """Counts, and the threads that make them."""

    def __init__(self, address: str, expected: dict[int, list[str]]) -> None:
        self._address, self._expected = address, expected
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.over = threading.Event()

    def work(self) -> None:
        with Client(self._address) as client:
            while not self.over.is_set():
                length = random.choice(LENGTHS)
                try:
                    texts = job(client, length)
                except (SegcoreError, AssertionError) as error:
                    self.counts["sessions lost"] += 1
                    self.faults.append(f"{type(error).__name__}: {error}")
                    continue
                self.counts["sessions"] += 1
                different = sum(a != b for a, b in zip(texts, self._expected[length], strict=True))
                self.counts["answers different"] += different

    def kill(self) -> None:
        while not self.over.wait(random.uniform(*KILL_EVERY_S)):
            running = engines()
            if running:
                os.kill(random.choice(running).pid, signal.SIGKILL)
                self.counts["kills"] += 1


def scale(config: ServeConfig, replicas: int) -> None:
    from ray import serve

    from services.serving.app import APPLICATION, build

    serve.run(build(config, replicas), name=APPLICATION, route_prefix="/")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--minutes", type=float, default=20)
    options.add_argument("--clients", type=int, default=4)
    options.add_argument("--replicas", type=int, default=3)
    options.add_argument("--sessions")
    options.add_argument("--model")
    options.add_argument("--segment-tokens", type=int)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = ServeConfig(
            replicas=given.replicas,
            grpc_port=0,
            http_port=0,
            threads=1,
            past_directory=folder / "past",
            past_shared=str(folder / "shared"),
            past_host_bytes=2**30,
            sessions=given.sessions or str(folder / "sessions.sqlite"),
            lease_s=2,
            **({"model": given.model} if given.model else {}),
            **({"segment": {"segment_tokens": given.segment_tokens}} if given.segment_tokens else {}),
        )
        with local_service(config) as address:
            return soak(config, address, given)


def soak(config: ServeConfig, address: str, given: argparse.Namespace) -> int:
    with Client(address) as client:
        expected = {length: job(client, length) for length in LENGTHS}
    state = Soak(address, expected)
    threads = [threading.Thread(target=state.work) for _ in range(given.clients)]
    threads.append(threading.Thread(target=state.kill))
    for thread in threads:
        thread.start()
    third = 60 * given.minutes / 3
    time.sleep(third)
    scale(config, 1)
    print(f"scaled to 1 replica: {dict(state.counts)}", flush=True)
    time.sleep(third)
    scale(config, given.replicas)
    print(f"scaled to {given.replicas} replicas: {dict(state.counts)}", flush=True)
    before = memory()
    time.sleep(third)
    state.over.set()
    for thread in threads:
        thread.join()
    growth = memory() / before
    with Client(address) as client:
        left = len(list(client.list_sessions()))
    counts = state.counts
    print(f"{counts['sessions']} sessions with {len(ANSWERS)} answers each, {counts['kills']} replicas killed")
    print(f"lost: {counts['sessions lost']} sessions; different: {counts['answers different']} answers")
    print(f"left behind: {left} sessions; memory at the end: {growth:.2f} of that at two thirds")
    for fault in state.faults[:10]:
        print(fault)
    return int(bool(counts["sessions lost"] or counts["answers different"] or growth > MOST_GROWTH))


def memory() -> int:
    """Resident bytes of all processes of the service, engines excepted: those come and go."""
    mine = psutil.Process()
    killed = {process.pid for process in engines()}
    total = 0
    for process in [mine, *mine.children(recursive=True)]:
        if process.pid not in killed:
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
    return total


if __name__ == "__main__":
    sys.exit(main())
