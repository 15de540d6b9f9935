"""Whose turn it is: order, fairness, slots, and how much waits."""

from __future__ import annotations

import pytest

from segcore.engine.engine import Engine
from segcore.engine.request import Step
from segcore.errors import (
    Cancelled,
    ConfigError,
)
from tests.segcore.engines import SECONDS, STREAM, answer, ask, at_rest, engine_of, turns


def test_a_long_prefill_does_not_hold_up_another_answer(make_engine):
    """Sessions take turns: an answer that was asked for after a long document ends before the document does."""
    engine = make_engine()
    engine.open("long")
    engine.open("short")
    engine.append("short", STREAM[:10])
    engine.append("long", STREAM * 40)
    answer(engine, "short", 5)
    assert engine.session_stats("long").pending_tokens > 0
    engine.close("long")


def kinds(seen: list[tuple[Step, str]]) -> str:
    """The first letters of what turns were: Prefill, Decode, Control."""
    return "".join(step.name[0] for step, _ in seen)


def test_decode_waits_for_one_chunk_and_prefill_for_so_many_tokens(make_engine):
    engine = make_engine(decodes_per_chunk=3)
    engine.open("a")
    engine.open("b")
    engine.append("b", STREAM[:10])
    engine.flush("b").result(SECONDS)
    with at_rest(engine):
        seen = turns(engine)
        engine.append("a", STREAM)
        _, asked = ask(engine, "b", 11)
    asked.done.result(SECONDS)
    assert kinds(seen).startswith("DDDPDDDPDDDPDD")


def test_sessions_take_turns_within_a_kind(make_engine):
    engine = make_engine()
    with at_rest(engine):
        seen = turns(engine)
        for name in "abc":
            engine.open(name, tenant=name)
            engine.append(name, STREAM[:30])
            engine.flush(name)
    engine.check_integrity()
    assert "".join(names for step, names in seen if step is Step.PREFILL) == 4 * "abc"


def test_tenants_take_turns_however_many_sessions_they_have(make_engine):
    """The short request of one waits for one chunk of the other's uploads."""
    engine = make_engine(slots=2, slot_steps=2)
    with at_rest(engine):
        seen = turns(engine)
        for name in "abcd":
            engine.open(name, tenant="large")
            engine.append(name, STREAM[:40])
        engine.open("s", tenant="small")
        engine.append("s", STREAM[50:66])
    engine.check_integrity()
    order = "".join(names for _, names in seen)
    assert order.index("s") <= 5
    engine = make_engine()
    with at_rest(engine):
        seen = turns(engine)
        for name in "abcd":
            engine.open(name, tenant="large")
            engine.append(name, [ord(name), *STREAM[:39]])
        engine.open("s", tenant="small")
        engine.append("s", STREAM[50:66])
    engine.check_integrity()
    assert "".join(names for _, names in seen).startswith("asbsc")


def test_a_busy_session_gives_its_slot_after_so_many_turns(make_engine):
    engine = make_engine(slots=2, slot_steps=2)
    with at_rest(engine):
        seen = turns(engine)
        for name in "abc":
            engine.open(name, tenant=name)
            engine.append(name, STREAM[:40])
    engine.check_integrity()
    assert "".join(names for _, names in seen) == "ab" + "acb" * 4 + "c"


def test_an_idle_session_gives_its_slot_first(make_engine):
    engine = make_engine(slots=2)
    for name, tokens in (("i", 8), ("b", 24)):
        engine.open(name, tenant=name)
        engine.append(name, STREAM[:tokens])
    engine.check_integrity()
    with at_rest(engine):
        seen = turns(engine)
        engine.append("b", STREAM[:40])
        engine.open("n", tenant="n")
        engine.append("n", STREAM[:8])
    engine.check_integrity()
    assert "".join(names for _, names in seen) == "n" + "bbbbb"


def test_tokens_wait_until_a_chunk_is_full_or_asked_for(make_engine):
    engine = make_engine()
    engine.open("s")
    for tokens, done in ((13, 8), (3, 16), (7, 16), (2, 24)):
        engine.append("s", STREAM[:tokens])
        engine.check_integrity()  # waits until the engine is idle
        assert engine.session_stats("s").tokens == done
    assert engine.session_stats("s").pending_tokens == 1
    engine.flush("s").result(SECONDS)
    assert engine.session_stats("s").tokens == 25


def test_room_waits_for_the_engine(make_engine):
    engine = make_engine(max_pending_tokens=50)
    engine.open("s")
    engine.append("s", STREAM * 5)
    engine.room("s").result(SECONDS)
    assert engine.session_stats("s").pending_tokens <= 50
    engine.check_integrity()
    with at_rest(engine):
        engine.append("s", STREAM[: 50 - engine.session_stats("s").pending_tokens])
        assert engine.room("s").done()
        engine.append("s", [1])
        assert not engine.room("s").done()


def test_its_load_is_what_it_can_do_now(make_engine):
    def load(engine):
        stats = engine.stats()
        return stats.sessions, stats.working_sessions, stats.queued_tokens

    engine = make_engine()
    for name in ("rests", "waits for more", "works"):
        engine.open(name)
    engine.append("waits for more", STREAM[:5])
    with at_rest(engine):
        engine.append("works", STREAM)
        assert load(engine) == (3, 1, len(STREAM))
    engine.flush("works").result(SECONDS)
    assert load(engine) == (3, 0, 0)


def test_less_room_than_a_chunk_is_refused(tiny_lm):
    """The engine would wait for the chunk's rest, and whoever has it for room."""
    with pytest.raises(ConfigError, match=r"max_pending_tokens=7 must be .* at least 8"):
        engine_of(tiny_lm, max_pending_tokens=7)
    with pytest.raises(ConfigError, match=r"max_pending_tokens=15 must be .* at least 16"):
        engine_of(tiny_lm, max_pending_tokens=15, chunk_tokens=1024)


@pytest.mark.parametrize("end", [lambda engine: engine.close("s"), Engine.shutdown])
def test_nobody_waits_for_a_session_that_is_gone(make_engine, end):
    engine = make_engine()
    engine.open("s")
    with at_rest(engine):
        engine.append("s", STREAM * 20)
        waiting = [engine.room("s"), engine.flush("s"), ask(engine, "s")[1].done]
    end(engine)
    for future in waiting:
        with pytest.raises(Cancelled):
            future.result(SECONDS)
