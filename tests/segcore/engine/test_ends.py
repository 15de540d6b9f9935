"""How answers and sessions end, and which calls are refused."""

from __future__ import annotations

import pytest

from segcore.config import CacheConfig, FullConfig
from segcore.errors import (
    AlreadyExists,
    Busy,
    Cancelled,
    FailedPrecondition,
    InvalidRequest,
    LimitExceeded,
    NotFound,
)
from tests.conftest import VOCABULARY
from tests.segcore.engines import SECONDS, STREAM, answer, generation


def test_an_answer_ends_when_told_to(make_engine):
    engine = make_engine()
    engine.open("s")
    engine.append("s", STREAM)
    tokens: list[int] = []
    asked = generation(tokens, 1000, stop_at=3)
    engine.generate("s", asked)
    assert asked.done.result(SECONDS) == "stop"
    assert len(tokens) == 3
    aborted = generation([], 10**6)
    engine.generate("s", aborted)
    engine.abort(aborted)
    assert aborted.done.result(SECONDS) == "aborted"
    assert len(answer(engine, "s", 2)) == 2


def test_an_answer_ends_at_the_longest_stream(make_engine):
    engine = make_engine(max_session_tokens=100)
    engine.open("s")
    engine.append("s", STREAM)
    tokens: list[int] = []
    asked = generation(tokens, 1000)
    engine.generate("s", asked)
    assert asked.done.result(SECONDS) == "length"
    assert len(tokens) == 100 - len(STREAM)
    with pytest.raises(LimitExceeded, match="100 tokens"):
        engine.append("s", [1])
    assert answer(engine, "s", 1000) == []
    engine.flush("s").result(SECONDS)
    assert engine.session_stats("s").tokens == 100


def test_a_stream_may_be_as_long_as_the_limit(make_engine):
    engine = make_engine(max_session_tokens=100)
    engine.open("s")
    engine.append("s", STREAM + STREAM[:10])
    engine.flush("s").result(SECONDS)
    assert engine.session_stats("s").tokens == 100


def test_full_attention_ends_where_the_models_positions_end(make_engine):
    engine = make_engine(segment=FullConfig(segment_tokens=16))
    assert engine.max_stream_tokens == 512
    engine.open("s")
    with pytest.raises(LimitExceeded):
        engine.append("s", [1] * 513)


def test_wrong_calls_are_refused(make_engine):
    engine = make_engine(max_sessions=2)
    engine.open("a")
    with pytest.raises(AlreadyExists):
        engine.open("a")
    engine.open("b")
    with pytest.raises(Busy):
        engine.open("c")
    with pytest.raises(Busy):
        engine.fork("a", "c")
    with pytest.raises(Busy):
        engine.restore("c", engine.snapshot("a"))
    with pytest.raises(NotFound):
        engine.append("absent", [1])
    with pytest.raises(FailedPrecondition, match="empty"):
        engine.generate("a", generation([]))
    engine.append("a", STREAM)
    asked = generation([], 10**6)
    engine.generate("a", asked)
    with pytest.raises(FailedPrecondition, match="answering"):
        engine.flush("a")
    engine.close("a")
    with pytest.raises(Cancelled):
        asked.done.result(SECONDS)


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**40])
def test_a_token_that_the_model_does_not_have_is_refused(make_engine, token):
    """One bad token would end every session of its batch."""
    engine = make_engine()
    engine.open("s")
    with pytest.raises(InvalidRequest, match="between 0 and 299"):
        engine.append("s", [1, token])
    assert engine.session_stats("s").pending_tokens == 0


def test_closing_frees_everything(make_engine, tmp_path):
    engine = make_engine(cache=CacheConfig(directory=tmp_path, reuse=False))
    for _ in range(3):
        engine.open("s")
        engine.append("s", STREAM)
        engine.flush("s").result(SECONDS)
        engine.check_integrity()
        assert engine.stats().past_bytes["disk"] > 0
        assert list(tmp_path.rglob("*.safetensors"))
        engine.close("s")
        stats = engine.stats()
        assert (stats.sessions, stats.past_bytes) == (0, {"host": 0, "disk": 0})
        assert not list(tmp_path.rglob("*.safetensors"))
