"""Thousands of sessions over hundreds of replicas, simulated: where does it break?

    python -m benchmarks.scale_sim                              # growing clusters, with failures; then what gives first
    python -m benchmarks.scale_sim --replicas 300 --per-replica 60 --store-gbytes 10

Sessions come, upload a document, ask some questions with pauses between, and go. A replica prefills one segment at a
time and decodes in slots. Sessions are placed by the very ring that Serve uses. A replica that fails takes its
sessions' states with it: they are restored where the ring puts them, closed segments from the shared store, or by
running their tokens again, whichever is sooner; tokens of answers are run one by one, as they were. Its successor has
another place on the ring, which moves sessions again. What is simulated are queues for prefill, slots, links and the
store; of a pass nothing but its time.
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import itertools
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ray.serve.experimental.consistent_hash_router import DEFAULT_NUM_VIRTUAL_NODES, _hash_bytes

from benchmarks.record import Figure, add, records


@dataclass(frozen=True, kw_only=True)
class Site:
    """What there is. Rates are of one replica; the defaults are Llama-3.1-8B on an H200 (docs/performance.md).

    decode_tokens_s: of each of `slots` sessions; again_tokens_s: of an answer that is run again. bytes_per_token:
    past KV in the store, which gives store_bytes_s to all together. start_s: until a failed replica's successor serves.
    notice_s: from a failure until another replica may take up a call that it broke off, the service's `lease_s`.
    """

    replicas: int = 100
    slots: int = 64
    prefill_tokens_s: float = 35_000
    decode_tokens_s: float = 123
    again_tokens_s: float = 227
    bytes_per_token: float = 131_680
    link_bytes_s: float = 3e9
    store_bytes_s: float = 40e9
    start_s: float = 90
    notice_s: float = 5
    mtbf_s: float = 7 * 86_400


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked for: so many sessions at any time, each for `questions` questions. fails: the share of replicas
    that do at once, half-way through. leaves: how many are taken away in order after three quarters."""

    sessions: int = 1000
    document_tokens: int = 128_000
    upload_tokens_s: float = 4000
    segment_tokens: int = 4096
    questions: int = 20
    pause_s: float = 120
    question_tokens: int = 60
    answer_tokens: int = 200
    hours: float = 2
    fails: float = 0.0
    leaves: int = 0


@dataclass
class Outcome:
    """first_s: from a question to its first token, each; recovery_s: the same for the first one after a move, or from a
    failure to the next token of what it broke off. moves: when each of those was."""

    first_s: list[float] = field(default_factory=list)
    recovery_s: list[float] = field(default_factory=list)
    moves: list[float] = field(default_factory=list)
    interrupted: int = 0
    restored_tokens: int = 0
    rerun_tokens: int = 0
    prefill_s: float = 0.0
    store_s: float = 0.0
    fullest: float = 0.0


class Ring:
    """Serve's: each replica stands at a hundred places of a circle, and a session goes to the next one."""

    def __init__(self) -> None:
        self._places: list[tuple[int, str]] = []

    def add(self, replica: str) -> None:
        for i in range(DEFAULT_NUM_VIRTUAL_NODES):
            bisect.insort(self._places, (_hash_bytes(f"{replica}:{i}".encode()), replica))

    def remove(self, replica: str) -> None:
        self._places = [place for place in self._places if place[1] != replica]

    def find(self, session: str) -> str:
        at = bisect.bisect_right(self._places, (_hash_bytes(session.encode()), "￿"))
        return self._places[at % len(self._places)][1]


@dataclass
class Replica:
    """When each of its resources is free."""

    slots: list[float]
    prefill: float = 0.0
    link: float = 0.0
    sessions: set[str] = field(default_factory=set)


@dataclass
class Session:
    name: str
    tokens: int = 0
    answered: int = 0  # of its tokens
    asked: int = 0
    answering: bool = False
    home: str | None = None
    busy_until: float = 0.0
    turn: int = 0  # events of earlier turns are void
    broken_at: float | None = None  # since when its client waits for what a failure broke off


class Simulation:
    def __init__(self, site: Site, load: Load, seed: int = 0) -> None:
        self.site, self.load, self.out = site, load, Outcome()
        self._rng, self._numbers, self._order = random.Random(seed), itertools.count(), itertools.count()
        self._ring, self._replicas = Ring(), dict[str, Replica]()
        self._sessions: dict[str, Session] = {}
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._store = 0.0
        self._answered_share = load.answer_tokens / (load.question_tokens + load.answer_tokens)

    def run(self) -> Outcome:
        end = self.load.hours * 3600
        for _ in range(self.site.replicas):
            self._join(0.0)
        for _ in range(self.load.sessions):
            self._at(self._rng.uniform(0, end / 4), self._begin)
        if self.load.fails:
            self._at(end / 2, self._fail_many)
        if self.load.leaves:
            self._at(3 * end / 4, self._take_away)
        while self._events and self._events[0][0] < end:
            now, _, event = heapq.heappop(self._events)
            event(now)
        counts = [len(replica.sessions) for replica in self._replicas.values()]
        self.out.fullest = max(counts) / (sum(counts) / len(counts)) if sum(counts) else 0.0
        self.out.prefill_s /= end * self.site.replicas
        self.out.store_s /= end
        return self.out

    def _at(self, when: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), event))

    def _turn(self, session: Session, when: float, event: Callable[[Session, float], None]) -> None:
        """The session's next turn; what was to come before is void."""
        session.turn += 1
        turn = session.turn
        self._at(when, lambda now: event(session, now) if session.turn == turn else None)

    # Replicas.

    def _join(self, now: float) -> None:
        name = f"replica-{next(self._numbers)}"
        self._replicas[name] = Replica([now] * self.site.slots, prefill=now, link=now)
        self._ring.add(name)
        self._at(now + self._rng.expovariate(1 / self.site.mtbf_s), lambda then: self._fail(name, then))

    def _fail(self, name: str, now: float) -> None:
        if name not in self._replicas or len(self._replicas) == 1:
            return
        lost = self._replicas.pop(name)
        self._ring.remove(name)
        self._at(now + self.site.start_s, self._join)
        for session in [self._sessions[each] for each in sorted(lost.sessions)]:
            session.home = None
            if session.busy_until > now:  # its client asks again
                self.out.interrupted += 1
                session.broken_at = now
                self._forget_rest(session, now)
                self._turn(session, now + self.site.notice_s, self._ask if session.asked else self._upload)

    def _forget_rest(self, session: Session, now: float) -> None:
        """Of an answer that broke off, what hadn't been given."""
        if session.answering:
            left = min(self.load.answer_tokens, int((session.busy_until - now) * self.site.decode_tokens_s))
            session.tokens -= left
            session.answered -= left

    def _fail_many(self, now: float) -> None:
        names = sorted(self._replicas)
        for name in self._rng.sample(names, round(self.load.fails * len(names))):
            self._fail(name, now)

    def _take_away(self, now: float) -> None:
        """Replicas that end what they have begun, and have no successor."""
        for name in self._rng.sample(sorted(self._replicas), self.load.leaves):
            self._ring.remove(name)
            for session in self._replicas.pop(name).sessions:
                self._sessions[session].home = None

    # Sessions.

    def _begin(self, now: float) -> None:
        session = Session(f"session-{next(self._numbers)}")
        self._sessions[session.name] = session
        self._upload(session, now)

    def _upload(self, session: Session, now: float) -> None:
        self._arrive(session, now, self._take_segment)

    def _take_segment(self, session: Session, now: float) -> None:
        """One segment of the document; the next one when it has come and this one has run."""
        done = self._prefill(self._home(session), now, self.load.segment_tokens)
        session.tokens += self.load.segment_tokens
        session.busy_until = done
        following = max(done, now + self.load.segment_tokens / self.load.upload_tokens_s)
        self._turn(session, following, self._ask if session.tokens >= self.load.document_tokens else self._upload)

    def _ask(self, session: Session, now: float) -> None:
        moved = session.home is None or session.home != self._ring.find(session.name)
        since = now if session.broken_at is None else session.broken_at
        session.broken_at = None
        if moved:
            self.out.moves.append(now)
        waits = self.out.recovery_s if moved else self.out.first_s
        self._arrive(session, now, lambda here, ready: self._answer(here, ready, since, waits))

    def _answer(self, session: Session, now: float, since: float, waits: list[float]) -> None:
        replica = self._home(session)
        ready = max(now, heapq.heappop(replica.slots))
        first = self._prefill(replica, ready, self.load.question_tokens) + 1 / self.site.decode_tokens_s
        session.busy_until = first + self.load.answer_tokens / self.site.decode_tokens_s
        heapq.heappush(replica.slots, session.busy_until)
        waits.append(first - since)
        session.tokens += self.load.question_tokens + self.load.answer_tokens
        session.answered += self.load.answer_tokens
        session.answering = True
        session.asked += 1
        if session.asked < self.load.questions:
            self._turn(session, session.busy_until + self._rng.expovariate(1 / self.load.pause_s), self._ask)
        else:
            self._turn(session, session.busy_until, self._leave)

    def _leave(self, session: Session, now: float) -> None:
        if session.home in self._replicas:
            self._replicas[session.home].sessions.discard(session.name)
        del self._sessions[session.name]
        self._begin(now)

    def _home(self, session: Session) -> Replica:
        """Where it is; if that was taken away meanwhile, where it goes next."""
        return self._replicas[session.home or self._ring.find(session.name)]

    def _arrive(self, session: Session, now: float, then: Callable[[Session, float], None]) -> None:
        """What is to be done once the session's state is on its replica."""
        session.answering = False
        home = self._ring.find(session.name)
        if session.home == home:
            then(session, now)
            return
        if session.home in self._replicas:
            self._replicas[session.home].sessions.discard(session.name)
        session.home = home
        self._replicas[home].sessions.add(session.name)
        if session.tokens:
            self._restore(session, now, then)
        else:
            then(session, now)

    def _restore(self, session: Session, now: float, then: Callable[[Session, float], None]) -> None:
        """Closed segments from the store and the open one run, or all of them run: whichever is done first. Documents
        and questions are run at prefill's pace, answers token by token, beside what others do."""
        site, replica = self.site, self._home(session)
        closed = session.tokens // self.load.segment_tokens * self.load.segment_tokens
        size = closed * site.bytes_per_token
        read = max(max(now, replica.link) + size / site.link_bytes_s, max(now, self._store) + size / site.store_bytes_s)
        rest = session.tokens - closed
        rest_answered = min(session.answered, rest * self._answered_share)
        prompt = session.tokens - session.answered
        rest_s = (rest - rest_answered) / site.prefill_tokens_s + rest_answered / site.again_tokens_s
        again_s = prompt / site.prefill_tokens_s + session.answered / site.again_tokens_s
        if max(read, replica.prefill) + rest_s <= max(now, replica.prefill) + again_s:
            self.out.restored_tokens += closed
            self.out.store_s += size / site.store_bytes_s
            self._store = max(now, self._store) + size / site.store_bytes_s
            replica.link = read
            self._run_again(session, read, rest, rest_answered, then)
        else:
            self._run_again(session, now, session.tokens, session.answered, then)

    def _run_again(
        self, session: Session, when: float, tokens: int, answered: float, then: Callable[[Session, float], None]
    ) -> None:
        self.out.rerun_tokens += tokens

        def begin(here: Session, now: float) -> None:
            done = self._prefill(self._home(here), now, tokens - answered) + answered / self.site.again_tokens_s
            self._busy(here, done, then)

        self._busy(session, when, begin)

    def _busy(self, session: Session, until: float, then: Callable[[Session, float], None]) -> None:
        session.busy_until = until
        self._turn(session, until, then)

    def _prefill(self, replica: Replica, ready: float, tokens: float) -> float:
        took = tokens / self.site.prefill_tokens_s
        self.out.prefill_s += took
        replica.prefill = max(ready, replica.prefill) + took
        return replica.prefill


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else 0.0


def row(site: Site, load: Load, out: Outcome) -> str:
    moved = out.restored_tokens + out.rerun_tokens
    return (
        f"{site.replicas:8} {load.sessions:9} {100 * load.fails:5.0f}% {out.fullest:8.2f}"
        f" {quantile(out.first_s, 0.5):8.2f} {quantile(out.first_s, 0.99):8.1f}"
        f" {quantile(out.recovery_s, 0.5):8.1f} {quantile(out.recovery_s, 0.99):8.1f} {out.interrupted:8}"
        f" {100 * out.prefill_s:7.0f}% {100 * out.store_s:6.1f}% {100 * out.rerun_tokens / moved if moved else 0:6.0f}%"
    )


HEAD = (
    "replicas  sessions fails  fullest  first token, s:  after a move:     answers prefill  store  rerun\n"
    "                                    median     99%   median      99% broken off    busy   busy  of moved"
)


def breaking_point(site: Site, load: Load, limit_s: float) -> int:
    """The most sessions a replica, to a twelfth or so, at which 99 of 100 first tokens come within so many seconds."""
    low, high = 1, 2
    while within(site, load, high, limit_s) and high < 4096:
        low, high = high, 2 * high
    while high - low > max(1, low // 12):
        middle = (low + high) // 2
        low, high = (middle, high) if within(site, load, middle, limit_s) else (low, middle)
    return low


def within(site: Site, load: Load, each: int, limit_s: float) -> bool:
    out = Simulation(site, replace(load, sessions=each * site.replicas)).run()
    return quantile(out.first_s, 0.99) <= limit_s


def figures(site: Site, load: Load, out: Outcome) -> list[Figure]:
    """What is kept of a row."""
    name = f"simulated_{site.replicas}_replicas_{100 * load.fails:.0f}_percent_fail"
    return [
        (f"{name}_first_token_99_s", quantile(out.first_s, 0.99), "s", None, None),
        (f"{name}_after_move_99_s", quantile(out.recovery_s, 0.99), "s", None, None),
        (f"{name}_fullest", out.fullest, "of the mean", None, None),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replicas", type=int, nargs="+", default=[10, 100, 300])
    parser.add_argument("--per-replica", type=int, default=30, help="sessions")
    parser.add_argument("--store-gbytes", type=float, default=40, help="a second, of the shared store")
    parser.add_argument("--limit", type=float, default=5, help="seconds to the first token, 99 of 100")
    parser.add_argument("--record", action="store_true", help="into benchmarks/results/scale_sim.json")
    options = parser.parse_args()
    site, kept = Site(store_bytes_s=options.store_gbytes * 1e9), list[Figure]()
    print(f"store: {options.store_gbytes:g} GB/s\n{HEAD}")
    for replicas in options.replicas:
        here = replace(site, replicas=replicas)
        for fails in (0.0, 0.1, 0.3):
            load = Load(sessions=options.per_replica * replicas, fails=fails)
            out = Simulation(here, load).run()
            kept += figures(here, load, out)
            print(row(here, load, out), flush=True)
    here = replace(site, replicas=options.replicas[0])
    for pause in (30, 120, 600):
        most = breaking_point(here, Load(pause_s=pause, hours=1), options.limit)
        kept.append((f"simulated_sessions_a_replica_asking_every_{pause}_s", most, "", None, None))
        print(f"a question every {pause} s: {most} sessions a replica keep within {options.limit:.0f} s")
    if options.record:
        add("scale_sim", records(" ".join(["-m benchmarks.scale_sim", *sys.argv[1:]]), kept, ("ray",)))


if __name__ == "__main__":
    main()
