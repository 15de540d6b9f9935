"""Sessions that share what they have in common: documents that are prefilled once, and what is read ahead.

Every answer is held against the same stream on an engine of its own: fp64, greedy, token for token.
"""

from __future__ import annotations

import torch

from segcore.config import CacheConfig
from segcore.engine.engine import Engine
from segcore.errors import (
    Cancelled,
)
from segcore.pastkv.session import SessionPast
from tests.segcore.engine.loop import BLOCK_BYTES
from tests.segcore.engines import SECONDS, STREAM, answer, at_rest, fill


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
    asked: list[torch.Tensor] = []
    prefetch = SessionPast.prefetch

    def noted(past: SessionPast, positions: torch.Tensor) -> None:
        asked.append(positions)
        prefetch(past, positions)

    monkeypatch.setattr(SessionPast, "prefetch", noted)
    engine = make_engine(cache=CacheConfig(directory=tmp_path, host_bytes=6 * BLOCK_BYTES))
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
