"""What fails ends its session alone; past KV that is lost is made again."""

from __future__ import annotations

import pytest

from segcore.config import CacheConfig
from segcore.engine import steps
from segcore.engine.request import Generation
from segcore.errors import (
    BlockMissing,
    SegcoreError,
    SessionFailed,
    StorageFull,
)
from segcore.pastkv.session import SessionPast
from segcore.sampling import SamplingParams
from tests.segcore.engine.loop import BLOCK_BYTES, by_hand
from tests.segcore.engines import SECONDS, STREAM, answer, ask, at_rest


def test_full_tiers_end_one_session_and_no_other(make_engine, tmp_path):
    engine = make_engine(cache=CacheConfig(directory=tmp_path, disk_bytes=0, host_bytes=6 * BLOCK_BYTES))
    engine.open("big")
    engine.open("small")
    engine.append("big", STREAM)
    with pytest.raises(StorageFull, match="give the disk tier room"):
        engine.flush("big").result(SECONDS)
    with pytest.raises(SessionFailed, match="give the disk tier room"):
        engine.append("big", [1])
    engine.append("small", STREAM[:10])
    assert len(answer(engine, "small", 3)) == 3
    engine.close("big")
    engine.append("small", STREAM[:20])
    engine.flush("small").result(SECONDS)
    assert engine.stats().faults["disk.StorageFull"] > 0


def test_damaged_blocks_are_made_again(make_engine, tmp_path, tiny_lm):
    engine = make_engine(cache=CacheConfig(directory=tmp_path, host_bytes=6 * BLOCK_BYTES))
    engine.open("s")
    engine.append("s", STREAM)
    engine.flush("s").result(SECONDS)
    engine.check_integrity()
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-300] + bytes(300))
    assert answer(engine, "s") == by_hand(tiny_lm, STREAM, 12)
    assert engine.stats().faults["disk.BlockDamaged"] > 0


def test_an_error_in_a_callback_ends_its_session_alone(make_engine):
    engine = make_engine()
    engine.open("s")
    engine.append("s", STREAM)

    asked = Generation(SamplingParams(), broken)
    engine.generate("s", asked)
    with pytest.raises(SegcoreError, match="internal error"):
        asked.done.result(SECONDS)
    engine.open("t")
    engine.append("t", STREAM)
    assert len(answer(engine, "t", 2)) == 2


def test_an_error_in_a_pass_ends_the_sessions_of_its_batch(make_engine, monkeypatch):
    engine = make_engine()
    for name in "ab":
        engine.open(name)
        engine.append(name, STREAM[:8])
        engine.flush(name).result(SECONDS)
    monkeypatch.setattr(engine._runner, "forward", broken)
    with at_rest(engine):
        asked = [ask(engine, name)[1] for name in "ab"]
    for one in asked:
        with pytest.raises(SegcoreError, match="internal error"):
            one.done.result(SECONDS)
    monkeypatch.undo()
    engine.open("c")
    engine.append("c", STREAM)
    assert len(answer(engine, "c", 2)) == 2


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("broken")


def test_a_state_that_cannot_be_brought_back_ends_its_session_alone(make_engine, monkeypatch):
    """As when the device has no room for it."""
    engine = make_engine(slots=1)
    monkeypatch.setattr(steps, "unpack", broken)
    engine.open("a")
    engine.append("a", STREAM)
    with pytest.raises(SegcoreError, match="internal error"):
        engine.flush("a").result(SECONDS)
    monkeypatch.undo()
    engine.open("b")
    engine.append("b", STREAM)
    assert len(answer(engine, "b", 2)) == 2


def test_past_kv_that_is_lost_each_time_ends_the_session(make_engine, monkeypatch):
    def lost(*_: object) -> None:
        raise BlockMissing("lost")

    monkeypatch.setattr(SessionPast, "gather", lost)
    engine = make_engine()
    engine.open("s")
    engine.append("s", STREAM)
    with pytest.raises(BlockMissing):
        engine.flush("s").result(SECONDS)


def test_past_kv_may_be_lost_any_number_of_times(make_engine, tiny_lm):
    engine = make_engine(cache=CacheConfig())
    engine.open("s")
    engine.append("s", STREAM)

    def lose(count: int) -> None:
        for key in engine._past._host.keys:
            engine._past._host.delete(key)

    assert answer(engine, "s", 160, at_token=lose) == by_hand(tiny_lm, STREAM, 160)
