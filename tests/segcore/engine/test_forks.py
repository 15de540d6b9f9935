"""Sessions as things to copy and to take back (I5), side by side (I6).

Every answer is held against the same stream on an engine of its own: fp64, greedy, token for token.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch

from segcore.engine import engine as engine_module
from segcore.errors import (
    AlreadyExists,
    Cancelled,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
)
from segcore.model import CausalLM
from tests.conftest import tiny_model
from tests.segcore.engines import POLICIES, SECONDS, STREAM, answer, ask, at_rest, engine_of, fill
from tests.segcore.test_invariants import MATRIX


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
