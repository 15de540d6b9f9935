"""The simulation of many replicas (scale_sim.py), held against a real service of three engines on this machine.

    python -m benchmarks.scale_check          # a quarter of an hour; writes benchmarks/results/scale_sim.json

Sessions upload a document and ask, with pauses between. Half-way through an engine is killed, and Serve starts another;
after three quarters one engine is taken away. Once the shared tier is quick, so that sessions that move are read from
it, and once it is slow, so that their tokens are run again. Then the same is simulated many times, with the rates that
one session alone has found; what the simulation knows nothing of is that engines share two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, Figure, add, records
from benchmarks.scale_sim import Load, Simulation, Site, quantile
from benchmarks.soak import QUESTION, TEXT, free_port, running
from segcore.errors import SegcoreError
from segcore.sampling import SamplingParams
from services.serving.client import Client
from services.serving.config import ServeConfig
from services.serving.local import local_service, scale

COMMAND = "-m benchmarks.scale_check"
REPLICAS, SESSIONS, PAUSE_S = 3, 8, 30.0
DOCUMENT_CHARACTERS, ANSWER = 4000, SamplingParams(max_tokens=8)
LEASE_S = 2.0
# What the shared tier gives, in bytes a second.
TIERS = {"read": 100_000_000, "rerun": 500_000}
BYTES_PER_TOKEN = 23_040  # of SmolLM2's past KV
SEEDS = 200


@dataclass
class Measured:
    """Of the real service. first_s, moves: as in the simulation's outcome; recovery_s: (seconds, when)."""

    first_s: list[float] = field(default_factory=list)
    recovery_s: list[float] = field(default_factory=list)
    moves: list[float] = field(default_factory=list)
    broken_off: int = 0
    lost: list[str] = field(default_factory=list)
    start_s: float = 0.0


class Trial:
    """Clients of a service, and what they see."""

    def __init__(self, config: ServeConfig, address: str, minutes: float) -> None:
        self._config, self._address, self._seconds = config, address, 60 * minutes
        self._began = time.monotonic()
        self.killed_at, self._killed = float("inf"), -1
        self.out = Measured()

    @property
    def now(self) -> float:
        return time.monotonic() - self._began

    def run(self) -> Measured:
        clients = [threading.Thread(target=self._session, args=(i,)) for i in range(SESSIONS)]
        for thread in clients:
            thread.start()
        time.sleep(self._seconds / 2 - self.now)
        self._kill()
        time.sleep(max(0.0, 3 * self._seconds / 4 - self.now))
        scale(REPLICAS - 1)
        for thread in clients:
            thread.join()
        return self.out

    def _kill(self) -> None:
        self._killed = random.choice(running("engine")).pid
        self.killed_at = self.now
        os.kill(self._killed, signal.SIGKILL)
        while self._killed in (found := {each.pid for each in running("engine")}) or len(found) < REPLICAS:
            time.sleep(0.1)
        self.out.start_s = self.now - self.killed_at

    def _session(self, number: int) -> None:
        rng = random.Random(number)
        time.sleep(rng.uniform(0, self._seconds / 4))
        name, start = f"scale-{number}-{time.time_ns()}", 6000 * number
        try:
            with Client(self._address) as client:
                client.create_session(name)
                client.upload(name, TEXT[start : start + DOCUMENT_CHARACTERS].encode())
                while self.now < self._seconds:
                    self._ask(client, name)
                    time.sleep(rng.expovariate(1 / PAUSE_S))
        except SegcoreError as error:
            self.out.lost.append(f"{type(error).__name__}: {error}")

    def _ask(self, client: Client, name: str) -> None:
        home, asked = self._owner(name), self.now
        tokens = [self.now for _ in client.generate(name, QUESTION, ANSWER)]
        broken = home == self._killed and asked < self.killed_at < tokens[-1]
        since = self.killed_at if broken else asked
        seconds = next(at for at in tokens if at > since) - since
        self.out.broken_off += broken
        if self._owner(name) == home:
            self.out.first_s.append(seconds)
        else:
            self.out.recovery_s.append(seconds)
            self.out.moves.append(asked)

    def _owner(self, name: str) -> int:
        """The engine's process that wrote the session last."""
        with sqlite3.connect(self._config.sessions) as directory:
            (owner,) = directory.execute("SELECT owner FROM sessions WHERE id = ?", (name,)).fetchone()
        directory.close()
        return int(owner.split(":")[1])


def calibrated(client: Client, tier_bytes_s: float) -> tuple[Site, Load]:
    """One session's rates, alone; the median of three."""
    found = []
    for i in range(3):
        name, began = client.create_session().session_id, time.monotonic()
        client.upload(name, TEXT[100_000 + 6000 * i :][:DOCUMENT_CHARACTERS].encode())
        times = []
        for _ in range(2):
            asked = time.monotonic()
            times.append((asked, [time.monotonic() for _ in client.generate(name, QUESTION, ANSWER)]))
        (_, tokens), (second, later) = times
        decode_s = (later[-1] - later[0]) / (len(later) - 1)
        alone_s = later[0] - second
        tokens_there = client.get_session(name).processed_tokens
        prefill_s = tokens[0] - began - alone_s
        found.append((tokens_there / prefill_s, 1 / decode_s, alone_s, float(tokens_there)))
        client.delete_session(name)
    prefill, decode, alone_s, document = (statistics.median(each) for each in zip(*found, strict=True))
    site = Site(
        replicas=REPLICAS, slots=8, prefill_tokens_s=prefill, decode_tokens_s=decode, bytes_per_token=BYTES_PER_TOKEN,
        link_bytes_s=tier_bytes_s, store_bytes_s=tier_bytes_s * REPLICAS, notice_s=LEASE_S, mtbf_s=1e12,
    )  # fmt: skip
    load = Load(
        sessions=SESSIONS, document_tokens=int(document), upload_tokens_s=1e9, segment_tokens=256, questions=10**6,
        pause_s=PAUSE_S, question_tokens=round((alone_s - 1 / decode) * prefill), answer_tokens=ANSWER.max_tokens,
        fails=1 / REPLICAS, leaves=1,
    )  # fmt: skip
    return site, load


def again_tokens_s() -> float:
    """At what rate answers are run again, with questions: an engine that holds one session takes up two by turns."""
    with tempfile.TemporaryDirectory() as name:
        config = service(Path(name), replicas=1, slots=1, max_sessions=1, segment={})  # in which no segment ends here
        with local_service(config) as address, Client(address) as client:

            def first_s(session: str, tokens: int) -> float:
                asked = time.monotonic()
                found = [
                    time.monotonic() for _ in client.generate(session, QUESTION, SamplingParams(max_tokens=tokens))
                ]
                return found[0] - asked

            for session in "ab":
                client.create_session(session)
                client.upload(session, TEXT[:1000].encode())
            waits = [[first_s(session, tokens) for session in "ab"] for tokens in (1, 64, 1)]
    before, _, after = (statistics.mean(each) for each in waits)
    return 64 / max(after - before, 1e-3)


def service(folder: Path, **changes: Any) -> ServeConfig:
    """On this machine, with all of its files in a folder."""
    settings: dict[str, Any] = {
        "replicas": REPLICAS,
        "grpc_port": free_port(),
        "http_port": free_port(),
        "threads": 1,
        "past_directory": folder / "past",
        "past_shared": str(folder / "shared"),
        "past_host_bytes": 2**28,
        "sessions": str(folder / "sessions.sqlite"),
        "lease_s": LEASE_S,
        "segment": {"segment_tokens": 256},
    }
    return ServeConfig(**settings | changes)


def measure(tier: str, minutes: float) -> tuple[Site, Load, Measured]:
    """A service of its own, under load."""
    again = again_tokens_s()
    with tempfile.TemporaryDirectory() as name:
        config = service(Path(name), past_restore_bytes_per_s=TIERS[tier])
        with local_service(config) as address:
            with Client(address) as client:
                site, load = calibrated(client, TIERS[tier])
            print(f"{tier}: {site.prefill_tokens_s:.0f} and {site.decode_tokens_s:.1f} tokens a second", flush=True)
            out = Trial(config, address, minutes).run()
    return replace(site, start_s=out.start_s, again_tokens_s=again), replace(load, hours=minutes / 60), out


def simulated(site: Site, load: Load) -> dict[str, list[float]]:
    """What `SEEDS` simulations say of each of the figures."""
    found: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        out = Simulation(site, load, seed).run()
        told = summary(out.first_s, out.recovery_s, out.moves, out.interrupted, 1800 * load.hours)
        for name, value in told.items():
            found.setdefault(name, []).append(value)
    return found


def summary(
    first_s: list[float], recovery_s: list[float], moves: list[float], broken_off: float, half: float
) -> dict[str, float]:
    late = 1.5 * half
    return {
        "first_token_s": quantile(first_s, 0.5),
        "first_token_90_s": quantile(first_s, 0.9),
        "after_move_s": quantile(recovery_s, 0.5),
        "after_move_most_s": max(recovery_s, default=0.0),
        "moved_by_failure": sum(half <= at < late for at in moves),
        "moved_by_leaving": sum(at >= late for at in moves),
        "broken_off": broken_off,
    }


def figures_of(tier: str, site: Site, load: Load, out: Measured) -> list[Figure]:
    """Each measured figure, beside the simulations' median and the range of nine in ten of them."""
    told = summary(out.first_s, out.recovery_s, out.moves, out.broken_off, 1800 * load.hours)
    expected = simulated(site, load)
    made: list[Figure] = [(f"{tier}_sessions_lost", len(out.lost), "", "<= 0", None)]
    made.append((f"{tier}_questions", len(out.first_s) + len(out.recovery_s), "", None, None))
    for name, value in told.items():
        low, middle, high = (quantile(expected[name], share) for share in (0.05, 0.5, 0.95))
        peer = f"simulated: {middle:.3g}, nine in ten {low:.3g} to {high:.3g}"
        made.append((f"{tier}_{name}", value, "s" if name.endswith("_s") else "", None, peer))
    return made


def main() -> int:
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # on a busy machine Ray takes longer than it waits
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--minutes", type=float, default=5, help="for each tier")
    options.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS))
    given = options.parse_args()
    lost = 0
    for tier in given.tiers:
        site, load, out = measure(tier, given.minutes)
        figures = figures_of(tier, site, load, out)
        for name, value, unit, _, peer in figures:
            print(f"{name}: {value:.3g} {unit}   {peer or ''}", flush=True)
        add("scale_sim", records(" ".join([COMMAND, *sys.argv[1:]]), figures, ("ray",)))
        raw = {"site": asdict(site), "load": asdict(load), "measured": asdict(out)}
        (RESULTS / "raw" / f"scale_check_{tier}.json").write_text(json.dumps(raw) + "\n")
        lost += len(out.lost)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
