"""Sessions as things to copy, move and take back (I4, I5), side by side (I6), and sharing what they have in common.

Every answer is held against the same stream on an engine of its own: fp64, greedy, token for token.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from segcore.config import CacheConfig, SegmentConfig
from segcore.engine import engine as engine_module
from segcore.engine.engine import Engine
from segcore.engine.snapshot import Snapshot
from segcore.errors import (
    AlreadyExists,
    BlockDamaged,
    BlockMismatch,
    Cancelled,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
)
from segcore.model import CausalLM
from segcore.pastkv.session import SessionPast
from tests.conftest import VOCABULARY, tiny_model, tiny_segment
from tests.segcore.engines import SECONDS, answer, ask, at_rest, engine_of
from tests.segcore.test_invariants import MATRIX

STREAM = torch.randint(0, VOCABULARY, (90,), generator=torch.Generator().manual_seed(11)).tolist()


@pytest.fixture
def make_engine(tiny_lm, running) -> Callable[..., Engine]:
    return lambda **changes: running(engine_of(tiny_lm, **changes))


def fill(engine: Engine, session: str, stream: list[int], *, mark: bool = False) -> None:
    engine.append(session, stream)
    if mark:
        engine.mark(session)
    engine.flush(session).result(SECONDS)


# Every policy; the quick tests run one.
POLICIES = [
    pytest.param(name, marks=() if name == "segmented" else pytest.mark.slow)
    for name in sorted({config.policy: name for name, config in reversed(MATRIX.items())}.values())
]


@pytest.mark.parametrize("policy", POLICIES)
def test_i4_a_restored_session_continues_as_if_never_interrupted(make_engine, policy):
    engine = make_engine(segment=MATRIX[policy])
    engine.open("s")
    fill(engine, "s", STREAM[:70], mark=True)
    with at_rest(engine):
        engine.append("s", STREAM[70:73])  # still waiting when the snapshot is taken
        engine.mark("s")
        data = engine.snapshot("s")
        engine.restore("same", data)
        assert engine.snapshot("same") == data
    engine.append("s", STREAM[73:])
    expected = answer(engine, "s", temperature=1.0, seed=3)
    other = make_engine(segment=MATRIX[policy])
    other.restore("t", data)
    other.append("t", STREAM[73:])
    assert answer(other, "t", temperature=1.0, seed=3) == expected
    assert len(set(expected)) > 3


@pytest.mark.slow
def test_i4_in_another_process_bit_for_bit(tiny_lm, tmp_path):
    """bf16, past KV in a shared folder: the other process gives the same bytes of state as this one, later."""
    lm = CausalLM(tiny_model(dtype=torch.bfloat16))
    shared = tmp_path / "shared"
    engine = engine_of(lm, cache=CacheConfig(shared=str(shared)))
    engine.open("s")
    fill(engine, "s", STREAM[:75], mark=True)
    engine.check_integrity()
    (tmp_path / "snapshot").write_bytes(engine.snapshot("s"))
    tokens = answer(engine, "s", 30)
    later = engine.snapshot("s")
    engine.shutdown()
    code = f"""
import torch
torch.set_num_threads(1)
from pathlib import Path
from segcore.config import CacheConfig
from segcore.model import CausalLM
from tests.conftest import tiny_model
from tests.segcore.engines import answer, engine_of
engine = engine_of(CausalLM(tiny_model(dtype=torch.bfloat16)), cache=CacheConfig(shared={str(shared)!r}))
engine.restore("s", Path({str(tmp_path / "snapshot")!r}).read_bytes())
assert engine.session_stats("s").tokens == 75
print(answer(engine, "s", 30))
Path({str(tmp_path / "later")!r}).write_bytes(engine.snapshot("s"))
assert not engine.stats().faults, engine.stats().faults
engine.shutdown()
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tokens)
    assert (tmp_path / "later").read_bytes() == later


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_alone_bring_a_session_back(make_engine, policy):
    """No tier has the blocks, and the state in the snapshot is damaged: the tokens are run again."""
    engine = make_engine(segment=MATRIX[policy])
    engine.open("s")
    fill(engine, "s", STREAM[:40], mark=True)
    answer(engine, "s", 5)
    fill(engine, "s", STREAM[40:], mark=True)
    data = engine.snapshot("s")
    other = make_engine(segment=MATRIX[policy])
    other.restore("s", flipped(data, places(data)["state.window.0.0.v_HND"][1] - 1))
    assert answer(other, "s") == answer(engine, "s")


def places(snapshot: bytes) -> dict[str, tuple[int, int]]:
    """Where in a snapshot's bytes each tensor begins and ends; "": the header."""
    data = 8 + int.from_bytes(snapshot[:8], "little")
    header = json.loads(snapshot[8:data])
    del header["__metadata__"]
    tensors = {name: (data + e["data_offsets"][0], data + e["data_offsets"][1]) for name, e in header.items()}
    return {"": (0, data)} | tensors


def flipped(data: bytes, at: int, bit: int = 6) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def test_no_flipped_bit_of_a_snapshot_is_silent(make_engine):
    """It is refused, or its state alone is given up, which the tokens bring back."""
    engine, random = make_engine(), Random(1)
    engine.open("s")
    fill(engine, "s", STREAM[:70], mark=True)
    with at_rest(engine):
        engine.append("s", STREAM[70:73])
        engine.mark("s")
        data = engine.snapshot("s")

    def read(data: bytes) -> Snapshot:
        return Snapshot.from_bytes(data, engine.fingerprint)

    def truth(snapshot: Snapshot) -> tuple[object, ...]:
        journal = snapshot.journal
        return snapshot.root, snapshot.keys, snapshot.marks, snapshot.pending, journal.tokens, journal.events

    assert read(data).marks == (73,)
    assert read(data).tensors is not None
    for name, (start, end) in places(data).items():
        for _ in range(1 if name else 200):
            damaged = flipped(data, random.randrange(start, end), random.randrange(8))
            if name.startswith("state."):
                assert read(damaged).tensors is None
            with suppress(BlockDamaged):
                assert truth(read(damaged)) == truth(read(data))


def test_a_snapshot_of_another_model_configuration_or_tenant_is_refused(make_engine):
    engine = make_engine(model="a")
    engine.open("s", tenant="one")
    fill(engine, "s", STREAM)
    data = engine.snapshot("s")
    with pytest.raises(BlockMismatch, match="another model"):
        make_engine(model="b").restore("s", data, tenant="one")
    with pytest.raises(BlockMismatch, match="another segment"):
        make_engine(model="a", segment=tiny_segment(tail_tokens=7)).restore("s", data, tenant="one")
    with pytest.raises(BlockMismatch, match="another tenant"):
        make_engine(model="a").restore("s", data)
    with pytest.raises(AlreadyExists):
        engine.restore("s", data, tenant="one")


@pytest.mark.parametrize("spoil", [lambda d: d[:100], lambda d: b"", lambda d: d[:-1], lambda d: b"x" * 50])
def test_a_broken_snapshot_is_refused(make_engine, spoil):
    engine = make_engine()
    engine.open("s")
    fill(engine, "s", STREAM)
    with pytest.raises(BlockDamaged):
        engine.restore("t", spoil(engine.snapshot("s")))
    with pytest.raises(NotFound):
        engine.flush("t")


@pytest.mark.parametrize("policy", POLICIES)
def test_i5_a_fork_and_its_parent_continue_as_if_alone(make_engine, policy):
    alone = make_engine(segment=MATRIX[policy])
    for name, end in (("a", STREAM[:30]), ("b", STREAM[30:70])):
        alone.open(name)
        fill(alone, name, STREAM + end)
    expected = {name: answer(alone, name) for name in "ab"}
    engine = make_engine(segment=MATRIX[policy])
    engine.open("a")
    fill(engine, "a", STREAM)
    engine.fork("a", "b")
    engine.append("a", STREAM[:30])
    engine.append("b", STREAM[30:70])
    for name in "ab":
        engine.flush(name).result(SECONDS)
    asked = {name: ask(engine, name) for name in "ab"}
    for _, generation in asked.values():
        generation.done.result(SECONDS)
    # The passes before the fork ended elsewhere than alone: in fp64 that changes nothing.
    assert {name: tokens for name, (tokens, _) in asked.items()} == expected
    engine.close("a")
    assert len(answer(engine, "b", 3)) == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.fork("s", "t"),
        lambda engine: engine.snapshot("s"),
        lambda engine: engine.rewind("s", 0),
        lambda engine: engine.close("s"),
    ],
    ids=["fork", "snapshot", "rewind", "close"],
)
def test_a_call_waits_for_the_turns_end(make_engine, monkeypatch, call):
    engine, begun, go_on = make_engine(), threading.Event(), threading.Event()
    forward = engine._runner.forward

    def slow(*args: object, **options: object) -> object:
        begun.set()
        assert go_on.wait(SECONDS)
        return forward(*args, **options)

    monkeypatch.setattr(engine._runner, "forward", slow)
    engine.open("s")
    engine.append("s", STREAM)
    assert begun.wait(SECONDS)
    with ThreadPoolExecutor(1) as pool:
        called = pool.submit(call, engine)
        assert not wait([called], timeout=0.2).done
        go_on.set()
        called.result(SECONDS)


def test_a_fork_of_an_answering_session_stands_where_its_parent_stood(make_engine):
    """The answer isn't continued in the fork; asked again, it goes on as its parent's."""
    engine, begun = make_engine(), threading.Event()
    engine.open("a")
    engine.append("a", STREAM)
    tokens, asked = ask(engine, "a", 200, at_token=lambda count: begun.set())
    assert begun.wait(SECONDS)
    engine.fork("a", "b")
    engine.restore("c", engine.snapshot("a"))
    for name in "bc":
        done = engine.session_stats(name).tokens - len(STREAM)
        again = answer(engine, name, 20)
        asked.done.result(SECONDS)
        assert again == tokens[done : done + 20]


def test_a_fork_that_fails_leaves_nothing(make_engine, monkeypatch):
    engine = make_engine()
    engine.open("a")
    fill(engine, "a", STREAM)

    def broken(*_: object) -> None:
        raise RuntimeError("no room on the device")

    monkeypatch.setattr(engine_module, "counted", broken)
    with pytest.raises(RuntimeError):
        engine.fork("a", "b")
    monkeypatch.undo()
    engine.fork("a", "b")  # the name is free, and the books balance at the end


def test_a_fork_shares_blocks_and_does_not_copy_them(make_engine):
    engine = make_engine()
    engine.open("a")
    fill(engine, "a", STREAM)
    before = engine.stats().past_bytes
    engine.fork("a", "b")
    assert engine.stats().past_bytes == before
    with pytest.raises(AlreadyExists):
        engine.fork("a", "b")
    with pytest.raises(NotFound):
        engine.fork("absent", "c")


@pytest.mark.parametrize("policy", POLICIES)
def test_i6_tokens_do_not_depend_on_what_else_is_in_the_batch(make_engine, policy):
    """Also when states take turns on fewer slots than there are sessions."""
    streams = {f"s{i}": STREAM[i * 7 :][: 45 + i * 5] for i in range(5)}
    expected = {}
    for name, stream in streams.items():
        alone = make_engine(segment=MATRIX[policy])
        alone.open(name)
        alone.append(name, stream)
        expected[name] = answer(alone, name)
    for slots in (2, 8):
        engine = make_engine(segment=MATRIX[policy], slots=slots, slot_steps=3, decodes_per_chunk=2)
        asked = {}
        for name, stream in streams.items():
            engine.open(name)
            engine.append(name, stream)
            asked[name] = ask(engine, name)
        for _, generation in asked.values():
            generation.done.result(SECONDS)
        assert {name: tokens for name, (tokens, _) in asked.items()} == expected, slots


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_i6_holds_to_the_last_bit(dtype):
    """One width for all decode passes: company changes no bit, where it otherwise would (fp32 on every CPU so far)."""
    lm = CausalLM(tiny_model(dtype=dtype))
    states = []
    for company in (0, 3):
        engine = engine_of(lm, slots=4)
        names = [f"s{i}" for i in range(company + 1)]
        for i, name in enumerate(names):
            engine.open(name)
            fill(engine, name, STREAM[i:])
        asked = [ask(engine, name, 40) for name in names]
        for _, generation in asked:
            generation.done.result(SECONDS)
        states.append(engine.snapshot("s0"))
        engine.shutdown()
    assert states[0] == states[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_rewound_session_is_as_it_was_then(make_engine, policy):
    engine = make_engine(segment=MATRIX[policy])
    engine.open("s")
    engine.append("s", STREAM[:48])
    expected = answer(engine, "s")
    fill(engine, "s", STREAM, mark=True)
    for boundary in (48, 16, 0):
        engine.rewind("s", boundary)
        engine.append("s", STREAM[boundary:48])
        assert answer(engine, "s") == expected
    assert engine.session_stats("s").tokens == 48 + 11


def test_going_back_drops_what_waits(make_engine):
    """Tokens, marks and flushes that haven't been run; whoever waits for a flush or for room learns of it."""
    engine = make_engine()
    for name in "st":
        engine.open(name)
        fill(engine, name, STREAM[:90])
    with at_rest(engine):
        engine.append("s", STREAM[:40])
        engine.mark("s")
        flush, room = engine.flush("s"), engine.room("s")
        assert not room.done()
        engine.rewind("s", 80)
    assert room.result(SECONDS) is None
    with pytest.raises(Cancelled, match="went back"):
        flush.result(SECONDS)
    engine.append("s", STREAM[80:])
    assert answer(engine, "s", 60) == answer(engine, "t", 60)


def test_a_session_that_is_being_made_again_goes_back_as_any_other(make_engine):
    """Restored without its blocks, it can go back at once to where it was, though it isn't there yet."""
    engine = make_engine()
    engine.open("s")
    fill(engine, "s", STREAM)
    other = make_engine()
    with at_rest(other):
        other.restore("s", engine.snapshot("s"))
        assert other.session_stats("s").tokens == 0
        other.rewind("s", 48)
    engine.rewind("s", 48)
    assert answer(other, "s") == answer(engine, "s")


def test_a_session_without_a_slot_goes_back(make_engine):
    engine = make_engine(slots=1)
    for name in "st":
        engine.open(name)
        fill(engine, name, STREAM)
    engine.rewind("s", 48)
    fill(engine, "s", STREAM[48:])
    assert answer(engine, "s") == answer(engine, "t")


@pytest.mark.parametrize("tokens", [1, 17, 96, -16])
def test_a_session_goes_back_to_closed_boundaries_alone(make_engine, tokens):
    engine = make_engine()
    engine.open("s")
    fill(engine, "s", STREAM)
    with pytest.raises(InvalidRequest, match="a multiple of 16 up to 80"):
        engine.rewind("s", tokens)
    engine.append("s", STREAM)
    _, asked = ask(engine, "s", 10**6)
    with pytest.raises(FailedPrecondition, match="answering"):
        engine.rewind("s", 16)
    engine.abort(asked)
    asked.done.result(SECONDS)


def passes(engine: Engine) -> list[int]:
    """Tokens of every forward pass from now on."""
    seen: list[int] = []
    forward = engine._runner.forward

    def counted(tokens_BT, *args, **kwargs):
        seen.append(tokens_BT.shape[1])
        return forward(tokens_BT, *args, **kwargs)

    engine._runner.forward = counted  # type: ignore[method-assign]
    return seen


def test_a_document_is_prefilled_once(make_engine, tmp_path):
    """The second session over the same tokens runs what isn't in whole segments, and nothing else."""
    engine = make_engine(cache=CacheConfig(directory=tmp_path))
    engine.open("a")
    engine.append("a", STREAM)
    expected = answer(engine, "a")
    engine.close("a")  # its blocks stay for the next
    seen = passes(engine)
    engine.open("b")
    engine.append("b", STREAM)
    assert answer(engine, "b") == expected
    assert sum(seen) == len(STREAM) - 80 + 11
    seen.clear()
    engine.open("c", tenant="another")
    engine.append("c", STREAM)
    assert answer(engine, "c") == expected
    assert sum(seen) == len(STREAM) + 11


def test_a_document_that_differs_late_is_shared_until_there(make_engine):
    engine = make_engine()
    engine.open("a")
    fill(engine, "a", STREAM)
    other = [*STREAM[:50], 1 if STREAM[50] == 0 else 0, *STREAM[51:]]
    seen = passes(engine)
    engine.open("b")
    engine.append("b", other)
    tokens = answer(engine, "b")
    assert sum(seen) == len(other) - 48 + 11
    alone = make_engine()
    alone.open("b")
    alone.append("b", other)
    assert answer(alone, "b") == tokens


def test_no_segment_is_adopted_across_a_mark(make_engine):
    """Other sessions ran these tokens without it."""
    answers = []
    for read_before in (False, True):
        engine = make_engine()
        if read_before:
            engine.open("before")
            fill(engine, "before", STREAM)
        with at_rest(engine):
            engine.open("s")
            engine.append("s", STREAM[:58])
            engine.mark("s")
            engine.append("s", STREAM[58:])
        answers.append(answer(engine, "s"))
    assert answers[0] == answers[1]


def test_a_session_closed_while_it_adopts_is_closed_quietly(make_engine, monkeypatch, caplog):
    engine = make_engine()
    engine.open("a")
    fill(engine, "a", STREAM)
    adopt = SessionPast.adopt

    def closed_meanwhile(past: SessionPast, key: str) -> object:
        engine._steps.fail(engine._sessions["b"], Cancelled("deleted"))
        return adopt(past, key)

    monkeypatch.setattr(SessionPast, "adopt", closed_meanwhile)
    engine.open("b")
    engine.append("b", STREAM)
    engine.check_integrity()
    engine.close("b")
    assert not caplog.records


def test_an_answer_right_after_adopted_segments(make_engine):
    """The stream ends where the last adopted segment ends: the logits come with it."""
    engine = make_engine()
    for name in "ab":
        engine.open(name)
        engine.append(name, STREAM[:80])
        engine.flush(name).result(SECONDS)
    assert answer(engine, "a") == answer(engine, "b")


def test_what_the_next_refresh_may_need_is_read_while_the_model_runs(make_engine, tmp_path, monkeypatch):
    """Little host memory: most blocks are on disk alone, and a close finds some of its rows in memory already."""
    block = 16 * 4 * 2 * 8 * 8
    asked: list[torch.Tensor] = []
    prefetch = SessionPast.prefetch

    def noted(past: SessionPast, positions: torch.Tensor) -> None:
        asked.append(positions)
        prefetch(past, positions)

    monkeypatch.setattr(SessionPast, "prefetch", noted)
    engine = make_engine(cache=CacheConfig(directory=tmp_path, host_bytes=6 * block))
    engine.open("s")
    fill(engine, "s", STREAM)
    assert asked
    assert {positions.shape[1] for positions in asked} == {8}
    plenty = make_engine()
    plenty.open("s")
    asked.clear()
    fill(plenty, "s", STREAM)
    assert not asked
    assert answer(plenty, "s") == answer(engine, "s")


class Sessions(RuleBasedStateMachine):
    """Anything a caller may do, in any order: at each answer, the tokens are those of a fresh engine that is fed the
    same stream at once. Budgets are small, slots few, and blocks get lost."""

    segment: SegmentConfig = tiny_segment()
    lm = None

    def __init__(self) -> None:
        super().__init__()
        Sessions.lm = Sessions.lm or CausalLM(tiny_model())
        block = 16 * 4 * 2 * 8 * 8
        self.engine = engine_of(Sessions.lm, slots=2, slot_steps=2, cache=CacheConfig(host_bytes=200 * block))
        self.streams: dict[str, list[int]] = {}
        self.marks: dict[str, set[int]] = {}
        self.count = 0

    def teardown(self) -> None:
        self.engine.check_integrity()
        self.engine.shutdown()

    def pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.streams)))

    @precondition(lambda self: len(self.streams) < 4)
    @rule()
    def open(self) -> None:
        self.count += 1
        self.engine.open(f"s{self.count}")
        self.streams[f"s{self.count}"], self.marks[f"s{self.count}"] = [], set()

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), first=st.integers(0, 3), count=st.integers(1, 40))
    def append(self, data: st.DataObject, first: int, count: int) -> None:
        name = self.pick(data)
        self.engine.append(name, STREAM[first : first + count])
        self.streams[name] += STREAM[first : first + count]

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def mark(self, data: st.DataObject) -> None:
        name = self.pick(data)
        self.engine.mark(name)
        self.marks[name].add(len(self.streams[name]))

    @precondition(lambda self: 0 < len(self.streams) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        name, self.count = self.pick(data), self.count + 1
        self.engine.fork(name, f"s{self.count}")
        self.streams[f"s{self.count}"] = list(self.streams[name])
        self.marks[f"s{self.count}"] = set(self.marks[name])

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        name = self.pick(data)
        self.engine.flush(name).result(SECONDS)
        segments = data.draw(st.integers(0, len(self.streams[name]) // 16))
        self.engine.rewind(name, 16 * segments)
        del self.streams[name][16 * segments :]
        self.marks[name] = {m for m in self.marks[name] if m < 16 * segments}

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        name = self.pick(data)
        snapshot = self.engine.snapshot(name)
        self.engine.close(name)
        self.engine.restore(name, snapshot)

    @rule()
    def lose_blocks(self) -> None:
        """Every block is gone from memory, and there is nowhere else to look."""
        with at_rest(self.engine):
            for key in self.engine._past._host.keys:
                self.engine._past._host.delete(key)

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        name = self.pick(data)
        self.engine.close(name)
        del self.streams[name], self.marks[name]

    @precondition(lambda self: any(self.streams.values()))
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, stream in self.streams.items() if stream)))
        tokens = answer(self.engine, name, 3)
        assert tokens == self.expected(name)
        self.streams[name] += tokens

    def expected(self, name: str) -> list[int]:
        assert Sessions.lm is not None
        engine, stream = engine_of(Sessions.lm), self.streams[name]
        engine.open("s")
        cuts = sorted({0, len(stream), *self.marks[name]})
        for start, stop in zip([*cuts[:-1]], cuts[1:], strict=True):
            if start in self.marks[name]:
                engine.mark("s")
            engine.append("s", stream[start:stop])
        if len(stream) in self.marks[name]:
            engine.mark("s")
        tokens = answer(engine, "s", 3)
        engine.shutdown()
        return tokens

    @invariant()
    def nothing_failed(self) -> None:
        assert all(session.failure is None for session in self.engine._sessions.values())


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
