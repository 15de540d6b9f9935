"""Streams continued from their tokens alone: the same passes, and so the same answers, to the last bit."""

from __future__ import annotations

import pytest
import torch

from segcore.config import CacheConfig
from segcore.engine.engine import Engine
from segcore.engine.replay import journal_of
from segcore.engine.speed import Speed
from tests.conftest import VOCABULARY
from tests.segcore.engines import POLICIES, SECONDS, ask, generation
from tests.segcore.test_invariants import MATRIX

STREAM = torch.randint(0, VOCABULARY, (120,), generator=torch.Generator().manual_seed(5)).tolist()
SPEED_SECONDS = Speed.seconds  # before the suite does without it
SAMPLED = {"temperature": 1.0, "seed": 9}


def live(engine: Engine, answer_tokens: int = 30) -> tuple[list[int], list[int]]:
    """A stream in which everything happens; its tokens, those of two answers included, and its stops."""
    engine.open("s")
    engine.append("s", STREAM[:37])
    engine.flush("s").result(SECONDS)
    engine.append("s", STREAM[37:50])
    engine.mark("s")
    engine.append("s", STREAM[50:53])
    first, asked = ask(engine, "s", 20, **SAMPLED)
    assert asked.done.result(SECONDS) == "length"
    engine.append("s", STREAM[53:100])
    engine.mark("s")
    engine.append("s", STREAM[100:102])
    second, asked = ask(engine, "s", answer_tokens, **SAMPLED)
    assert asked.done.result(SECONDS) == "length"
    tokens = [*STREAM[:53], *first, *STREAM[53:102], *second]
    stops = [37, ~50, *range(53, 73), ~120, *range(122, 122 + answer_tokens)]
    return tokens, stops


@pytest.mark.parametrize("policy", POLICIES)
def test_the_journal_follows_from_tokens_and_stops(make_engine, policy):
    engine = make_engine(segment=MATRIX[policy])
    tokens, stops = live(engine)
    engine.flush("s").result(SECONDS)  # the last token of the answer, by itself
    written = engine._sessions["s"].past.journal
    derived = journal_of(tokens, [*stops, len(tokens)], engine.config)
    assert derived.events.tolist() == written.events.tolist()
    assert derived.tokens.tolist() == written.tokens.tolist()


@pytest.mark.parametrize("policy", POLICIES)
def test_an_answer_goes_on_from_its_tokens_without_a_difference(make_engine, policy, tmp_path):
    """On another engine, with all of its past KV, or none."""
    cache = CacheConfig(shared=str(tmp_path))
    first = make_engine(segment=MATRIX[policy], cache=cache)
    tokens, stops = live(first)
    first._past.settle()
    for where in (cache, CacheConfig()):
        engine = make_engine(segment=MATRIX[policy], cache=where)
        for given in (0, 1, 7, 29):
            begun = len(tokens) - 30 + given
            engine.replay(f"t{given}", tokens[:begun], [stop for stop in stops if stop < begun])
            rest: list[int] = []
            asked = generation(rest, 30, **SAMPLED)
            asked.tokens = given
            engine.generate(f"t{given}", asked)
            assert asked.done.result(SECONDS) == "length"
            assert rest == tokens[begun:]


def test_what_stands_in_a_shared_tier_is_not_run_again(make_engine, tmp_path):
    cache = CacheConfig(shared=str(tmp_path))
    first = make_engine(cache=cache)
    tokens, stops = live(first)
    first._past.settle()
    engine = make_engine(cache=cache)
    engine.replay("t", tokens, stops)
    with engine._changed:
        assert engine._sessions["t"].past.segments == (len(tokens) - 1) // 16


def test_a_stream_of_which_nothing_has_run(make_engine):
    engine = make_engine()
    engine.replay("t", STREAM[:3], [])
    engine.append("t", STREAM[3:])
    other = make_engine()
    other.open("t")
    other.append("t", STREAM)
    rows = []
    for each in (engine, other):
        tokens, asked = ask(each, "t", 8)
        asked.done.result(SECONDS)
        rows.append(tokens)
    assert rows[0] == rows[1]


@pytest.mark.parametrize("quicker", ["restoring", "running"])
def test_what_is_quicker_is_done(make_engine, tmp_path, quicker, monkeypatch):
    """Blocks that are there are taken up, or their segments run again, by what either took of late; the stream is the
    same."""
    monkeypatch.setattr(Speed, "seconds", SPEED_SECONDS)
    cache = CacheConfig(shared=str(tmp_path))
    first = make_engine(cache=cache)
    tokens, stops = live(first)
    first.check_integrity()
    again = make_engine(cache=cache)
    slow, quick = (1.0, 1e6), (1e12, 1.0)  # units, and the seconds that they took
    slower = again._past._slower
    head_rate, slower._head_bytes = slower._rates["shared"], 1
    head_rate.add(*(quick if quicker == "restoring" else slow))
    again._steps._speed._rate.add(*(slow if quicker == "restoring" else quick))
    again.replay("s", tokens, [*stops, len(tokens)])
    again.flush("s").result(SECONDS)
    segments = len(tokens) // again.config.segment.segment_tokens
    counts = again.stats().counts
    restored = segments if quicker == "restoring" else 0
    names = ("restored.found", "restored.recomputed", "restored.lost", "segments.run")
    assert [counts.get(name, 0) for name in names] == [restored, segments - restored, 0, segments - restored + 1]
    assert ask(again, "s", 20)[0] == ask(first, "s", 20)[0]
