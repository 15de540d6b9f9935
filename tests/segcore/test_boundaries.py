"""Blocks without a boundary: what goes on from them runs some segments again, and nothing else changes."""

from __future__ import annotations

import pytest

from segcore.config import CacheConfig
from segcore.engine.request import Step
from tests.segcore.engines import SECONDS, answer, at_rest, turns
from tests.segcore.test_invariants import MATRIX, STREAM

TOKENS = STREAM.tolist()  # 8 segments of 16, and some


def begin(engine, session, tokens=TOKENS):
    engine.open(session)
    engine.append(session, tokens)
    engine.flush(session).result(SECONDS)


@pytest.fixture(params=["segmented", "segmented-some-readers"])
def undisturbed(request, make_engine):
    engine = make_engine(segment=MATRIX[request.param])
    begin(engine, "s")
    return MATRIX[request.param], answer(engine, "s")


@pytest.mark.parametrize("every", [2, 3, 5])
def test_a_stream_that_begins_alike_goes_on_from_the_last_boundary(undisturbed, make_engine, every):
    segment, want = undisturbed
    engine = make_engine(segment=segment, cache=CacheConfig(boundary_segments=every))
    begin(engine, "first")
    passes = turns(engine)
    begin(engine, "second")
    skipped = 8 // every * every * 16
    assert passes.count((Step.PREFILL, "second")) == 1 + -(-(len(TOKENS) - skipped) // 8)
    assert answer(engine, "second") == answer(engine, "first") == want


def test_where_no_boundary_was_reached_everything_runs_again(undisturbed, make_engine):
    segment, want = undisturbed
    engine = make_engine(segment=segment, cache=CacheConfig(boundary_segments=100))
    begin(engine, "first")
    begin(engine, "second")
    assert answer(engine, "second") == want


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
def test_another_engine_restores_a_session(undisturbed, make_engine, tmp_path, damaged, monkeypatch):
    segment, want = undisturbed
    cache = CacheConfig(boundary_segments=3, shared=str(tmp_path))
    engine, other = make_engine(segment=segment, cache=cache), make_engine(segment=segment, cache=cache)
    begin(engine, "s")
    engine._past.settle()
    data = engine.snapshot("s")
    if damaged:  # its state is of no use: the journal and the blocks are
        from segcore.engine.engine import Snapshot

        read = Snapshot.from_bytes
        monkeypatch.setattr(Snapshot, "from_bytes", lambda *args: _without_state(read(*args)))
    other.restore("s", data)
    assert answer(other, "s") == want


def _without_state(snapshot):
    snapshot.tensors = None
    return snapshot


def test_a_lost_block_is_made_again(undisturbed, make_engine):
    segment, want = undisturbed
    engine = make_engine(segment=segment, cache=CacheConfig(boundary_segments=3))
    begin(engine, "s")
    with at_rest(engine):
        past = engine._sessions["s"].past
        engine._past._host.delete(past.keys[4])
    assert answer(engine, "s") == want
