"""A service under load whose replicas are killed at random, and scaled 3 -> 1 -> 3: what was lost? Zero.

.venv/bin/python -m benchmarks.soak      # twenty minutes; writes benchmarks/results/soak.json, docs/soak.png

Clients upload documents and ask, greedy and sampled, over and over; every text is held against that of an undisturbed
run. Engines are killed while they work, and now and then the front. Past KV has too little room in memory and in the
shared tier, so that some of it is restored and some run again. Clients make a call again until it succeeds, as long as
it is answered UNAVAILABLE or RESOURCE_EXHAUSTED. Ends with status 1 if a session, a byte or a token was lost, if
nothing was killed or no session came to its end, or if the service has grown. Nothing goes by how quick the machine is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pydoc_data import topics
from typing import TypeVar

import psutil

from benchmarks.record import RESULTS, ROOT, Figure, records, write
from segcore.errors import AlreadyExists, Busy, NotFound, SegcoreError, Unavailable
from segcore.sampling import SamplingParams
from services.serving.client import Client
from services.serving.config import ServeConfig
from services.serving.local import local_service, scale

COMMAND = "-m benchmarks.soak"
TEXT = "\n\n".join(topics.topics.values())
# Where in the text a document begins, and its length.
DOCUMENTS = [(start, length) for length in (500, 2_000, 5_000) for start in (0, 100_000)]
QUESTION = "What is the assert statement used for?"
ANSWERS = (SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, temperature=1.0, seed=7))
KILL_EVERY_S = (10.0, 40.0)
# Every so many-th kill is the front's.
FRONT_KILLS = 6
# A call that fails for so long isn't made again: it is lost.
GIVE_UP_S = 900.0
SAMPLE_EVERY_S = 5.0
# The service's processes may take this much more in the last third than in the one before.
MOST_GROWTH = 1.1
# Room for past KV in memory, and in the shared tier: less than all documents take.
PAST_BYTES = 3 * 2**24
T = TypeVar("T")


class Worker:
    """A client's sessions, whose calls are made until they succeed. again: called each time that one is made again."""

    def __init__(self, client: Client, name: str, again: Callable[[], None]) -> None:
        self._client, self._name, self._again, self._sessions = client, name, again, 0

    def job(self, start: int, length: int) -> list[str]:
        """A session's whole life; its answers."""
        self._sessions += 1
        session, document = f"{self._name}-{self._sessions}", TEXT[start : start + length].encode()
        self._surely(lambda: self._client.create_session(session), AlreadyExists)
        self._surely(lambda: self._client.upload(session, document, document_id="document"), AlreadyExists)
        texts = [self._answer(session, params, str(i)) for i, params in enumerate(ANSWERS)]
        (uploaded,) = self._surely(lambda: self._client.get_session(session)).documents
        assert (uploaded.committed_offset, uploaded.finished) == (len(document), True), uploaded
        self._surely(lambda: self._client.delete_session(session), NotFound)
        return texts

    def _answer(self, session: str, params: SamplingParams, request_id: str) -> str:
        """An answer, taken up where it broke."""
        text, after = "", 0

        def read() -> None:
            nonlocal text, after
            for part in self._client.generate(session, QUESTION, params, request_id=request_id, after_token=after):
                text, after = text + part.text, part.token_index

        self._surely(read)
        return text

    def _surely(self, call: Callable[[], T], done: type[SegcoreError] | None = None) -> T:
        """Make a call until it succeeds. done: what a call raises that had succeeded without being answered."""
        began, calls = time.monotonic(), 0
        while True:
            calls += 1
            try:
                return call()
            except (Unavailable, Busy):
                if time.monotonic() - began > GIVE_UP_S:
                    raise
                self._again()
                time.sleep(1)
            except SegcoreError as error:
                if calls > 1 and done is not None and isinstance(error, done):
                    return None  # type: ignore[return-value]
                raise


def is_engine(process: psutil.Process) -> bool:
    """Whether it is an engine, one that starts or ends among them."""
    with suppress(psutil.Error):
        return "ServeReplica:segcore:engine" in " ".join(process.cmdline())
    return False


def running(deployment: str) -> list[psutil.Process]:
    """A deployment's replicas that run; of those that start, Serve gives a deployment up if it sees some die."""
    from ray.serve.context import _get_global_client

    from services.serving.app import APPLICATION

    replicas = _get_global_client().get_serve_details()["applications"][APPLICATION]["deployments"][deployment]
    found = []
    for replica in replicas["replicas"]:
        if replica["state"] == "RUNNING":
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(replica["pid"]))
    return found


def resident_bytes(found: list[psutil.Process]) -> list[int]:
    sizes = []
    for process in found:
        try:
            sizes.append(process.memory_info().rss)
        except psutil.Error:
            continue
    return sizes


class Soak:
    """Counts, samples, and the threads that make them."""

    def __init__(self, address: str, expected: dict[tuple[int, int], list[str]]) -> None:
        self._address, self._expected, self._began = address, expected, time.monotonic()
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.samples: list[dict[str, float]] = []
        self.over = threading.Event()

    def work(self, number: int) -> None:
        with Client(self._address) as client:
            worker = Worker(client, f"soak-{number}", lambda: self.count("calls made again"))
            while not self.over.is_set():
                document = random.choice(DOCUMENTS)
                try:
                    texts = worker.job(*document)
                except Exception as error:  # whatever it is, a session was lost
                    self.count("sessions lost")
                    self.faults.append(f"{type(error).__name__}: {error}")
                    continue
                self.count("sessions")
                for text, expected in zip(texts, self._expected[document], strict=True):
                    if text != expected:
                        self.count("answers different")
                        self.faults.append(f"{document}: {text!r} instead of {expected!r}")

    def kill(self) -> None:
        for number in itertools.count(1):
            if self.over.wait(random.uniform(*KILL_EVERY_S)):
                return
            front = number % FRONT_KILLS == 0
            while not (found := running("ingress" if front else "engine")) and not self.over.wait(1):
                pass
            if found:
                with suppress(ProcessLookupError):  # it ended by itself
                    os.kill(random.choice(found).pid, signal.SIGKILL)
                    self.count("fronts killed" if front else "engines killed")

    def sample(self) -> None:
        """Resident bytes of the service: of all but the engines, which come and go, and of the largest engine."""
        mine = psutil.Process()
        while not self.over.wait(SAMPLE_EVERY_S):
            ours = [mine, *mine.children(recursive=True)]
            engines = [process for process in ours if is_engine(process)]
            others = [process for process in ours if process not in engines]
            self.samples.append(
                {
                    "seconds": time.monotonic() - self._began,
                    "service_bytes": sum(resident_bytes(others)),
                    "engine_bytes": max(resident_bytes(engines), default=0),
                    **self.counts,
                }
            )

    def count(self, what: str) -> None:
        self.counts[what] += 1

    @property
    def minutes(self) -> float:
        """How long it has been going on."""
        return (time.monotonic() - self._began) / 60

    @property
    def growth(self) -> float:
        """Memory of the service without engines in the last third, to that in the third before."""
        return self._last_to(1, "service_bytes")

    @property
    def engine_growth(self) -> float:
        """The largest engine's memory in the last third to that in the first; between them the one engine is young."""
        return self._last_to(0, "engine_bytes")

    def _last_to(self, third: int, what: str) -> float:
        """Median of the last third to that of another one."""
        long, sizes = len(self.samples) // 3, [sample[what] for sample in self.samples]
        of = [statistics.median(sizes[i * long : (i + 1) * long]) if long else 0.0 for i in range(3)]
        return of[2] / of[third] if of[third] else 0.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def soak(config: ServeConfig, given: argparse.Namespace) -> Soak:
    """All of it, on a service of its own."""
    with local_service(config) as address:
        with Client(address) as client:
            worker = Worker(client, "undisturbed", lambda: None)
            expected = {document: worker.job(*document) for document in DOCUMENTS}
        state = Soak(address, expected)
        print("undisturbed answers are known", flush=True)
        clients = [threading.Thread(target=state.work, args=(i,)) for i in range(given.clients)]
        threads = [*clients, threading.Thread(target=state.kill), threading.Thread(target=state.sample)]
        for thread in threads:
            thread.start()
        try:
            for replicas in (1, given.replicas, None):
                time.sleep(60 * given.minutes / 3)
                print(f"after {state.minutes:.1f} minutes: {dict(state.counts)}", flush=True)
                if replicas is not None:
                    scale(replicas, GIVE_UP_S)
                    state.count(f"scaled to {replicas}")
        finally:
            state.over.set()
            for thread in threads:
                thread.join()
        with Client(address) as client:
            state.counts["sessions left behind"] = len(list(client.list_sessions()))
    return state


def figures_of(state: Soak) -> list[Figure]:
    counts = state.counts
    targets = {
        "sessions": ">= 1",
        "engines killed": ">= 20",
        "fronts killed": None,
        "calls made again": None,
        "sessions lost": "<= 0",
        "answers different": "<= 0",
        "sessions left behind": "<= 0",
    }
    made: list[Figure] = [("minutes", state.minutes, "min", ">= 20", None)]
    made += [(name.replace(" ", "_"), counts[name], "", target, None) for name, target in targets.items()]
    grown = f"<= {MOST_GROWTH}"
    made.append(("service_memory_growth", state.growth, "last third to the middle one", grown, None))
    # In the middle third there is one engine, killed again and again as it starts.
    made.append(("engine_memory_growth", state.engine_growth, "last third to the first", grown, None))
    return made


def draw(samples: list[dict[str, float]]) -> None:
    """docs/soak.png: the service's memory, and what has happened by then."""
    import matplotlib.pyplot as plt

    minutes = [sample["seconds"] / 60 for sample in samples]
    figure, (memory, work) = plt.subplots(1, 2, figsize=(11, 3.6))
    for name, label in (("service_bytes", "all but the engines"), ("engine_bytes", "largest engine")):
        memory.plot(minutes, [sample[name] / 2**20 for sample in samples], label=label)
    for name in ("sessions", "engines killed", "sessions lost", "answers different"):
        work.plot(minutes, [sample.get(name, 0) for sample in samples], label=name)
    for axes, label in ((memory, "resident MiB"), (work, "so far")):
        axes.set(xlabel="minutes", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "soak.png", dpi=110)


def main() -> int:
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # on a busy machine Ray takes longer than it waits
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--minutes", type=float, default=20)
    options.add_argument("--clients", type=int, default=4)
    options.add_argument("--replicas", type=int, default=3)
    options.add_argument("--sessions", help="a directory of sessions, such as redis://...; else a file")
    options.add_argument("--model", help="another than the default")
    options.add_argument("--segment-tokens", type=int, default=256)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = ServeConfig(
            replicas=given.replicas,
            grpc_port=free_port(),
            http_port=free_port(),
            threads=1,
            past_directory=folder / "past",
            past_shared=str(folder / "shared"),
            past_host_bytes=PAST_BYTES,
            past_shared_bytes=PAST_BYTES,
            sessions=given.sessions or str(folder / "sessions.sqlite"),
            lease_s=2,
            segment={"segment_tokens": given.segment_tokens},
            **({"model": given.model} if given.model else {}),
        )
        state = soak(config, given)
    figures = figures_of(state)
    for figure, value, unit, target, _ in figures:
        print(f"{figure}: {value:.4g} {unit} {target or ''}")
    for fault in state.faults[:10]:
        print(fault)
    whole = given.minutes >= 20
    if whole:  # a shorter run is a trial
        write("soak", records(" ".join([COMMAND, *sys.argv[1:]]), figures, ("ray", "grpcio")))
        (RESULTS / "raw" / "soak.json").write_text(json.dumps(state.samples) + "\n")
        draw(state.samples)
    lost = ("sessions lost", "answers different", "sessions left behind")
    idle = not (state.counts["sessions"] and state.counts["engines killed"])
    return int(
        idle
        or any(state.counts[what] for what in lost)
        or (whole and max(state.growth, state.engine_growth) > MOST_GROWTH)
    )


if __name__ == "__main__":
    sys.exit(main())
