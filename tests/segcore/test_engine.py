"""The engine on its thread: order, fairness, limits, aborts, failures; tokens equal a plain loop over F."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from segcore.config import CacheConfig, FullConfig
from segcore.engine.engine import Engine
from segcore.engine.request import Generation
from segcore.engine.runner import Runner
from segcore.errors import (
    AlreadyExists,
    Busy,
    Cancelled,
    FailedPrecondition,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    SessionFailed,
    StorageFull,
)
from segcore.model import CausalLM
from segcore.pastkv.manager import PastKVManager
from segcore.sampling import SamplingParams
from segcore.segments import tokens_to_next_cut
from tests.conftest import VOCABULARY, tiny_segment
from tests.segcore.engines import SECONDS, answer, engine_of, generation

STREAM = torch.randint(0, VOCABULARY, (90,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(autouse=True)
def _leaves_nothing(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob("engine-*"))


@pytest.fixture
def make_engine(_leaves_nothing, tiny_lm, tmp_path, running) -> Callable[..., Engine]:
    return lambda **changes: running(engine_of(tiny_lm, **{"cache": CacheConfig(directory=tmp_path)} | changes))


def greedy_by_hand(lm: CausalLM, stream: list[int], count: int) -> list[int]:
    """The same answer by a plain loop: all of the stream, a mark, then token by token."""
    config = tiny_segment()
    runner = Runner(lm, config)
    state, past = runner.begin(), PastKVManager(CacheConfig()).open_stream(runner.policy.layout)
    tokens: list[int] = []
    with torch.inference_mode():
        while state.length < len(stream):
            step = tokens_to_next_cut(state.filled, config, 8)
            logits = runner.advance(torch.tensor(stream[state.length : state.length + step]), state, past)
        while True:
            tokens.append(int(logits[-1].argmax()))
            if len(tokens) == count:
                return tokens
            logits = runner.advance(torch.tensor(tokens[-1:]), state, past)


@pytest.mark.parametrize("piece", [1, 7, 90])
def test_an_answer_equals_a_plain_loop_however_the_stream_arrives(make_engine, tiny_lm, piece):
    engine = make_engine()
    engine.open("s")
    for i in range(0, len(STREAM), piece):
        engine.append("s", STREAM[i : i + piece])
    assert answer(engine, "s") == greedy_by_hand(tiny_lm, STREAM, 12)


def test_what_was_answered_is_part_of_the_stream(make_engine, tiny_lm):
    engine = make_engine()
    engine.open("s")
    engine.append("s", STREAM)
    first = answer(engine, "s")
    engine.append("s", STREAM[:20])
    engine.flush("s").result(SECONDS)
    assert engine.session_stats("s").tokens == len(STREAM) + 12 + 20
    assert answer(engine, "s", 4) == greedy_by_hand(tiny_lm, STREAM + first + STREAM[:20], 4)


def test_sessions_side_by_side_answer_as_if_alone(make_engine, tiny_lm):
    engine = make_engine()
    streams = {f"s{i}": STREAM[i * 5 :] + STREAM[: i * 3] for i in range(4)}
    got: dict[str, list[int]] = {name: [] for name in streams}
    asked = []
    for name, stream in streams.items():
        engine.open(name)
        engine.append(name, stream)
        asked.append(generation(got[name]))
        engine.generate(name, asked[-1])
    for one in asked:
        one.done.result(SECONDS)
    assert got == {name: greedy_by_hand(tiny_lm, stream, 12) for name, stream in streams.items()}


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


def test_tokens_wait_until_a_chunk_is_full_or_asked_for(make_engine):
    engine = make_engine()
    engine.open("s")
    engine.append("s", STREAM[:13])
    engine.room("s").result(SECONDS)
    wait_for(lambda: engine.session_stats("s").tokens == 8)
    assert engine.session_stats("s").pending_tokens == 5
    engine.flush("s").result(SECONDS)
    assert engine.session_stats("s").tokens == 13


def wait_for(condition: Callable[[], bool]) -> None:
    ticker = threading.Event()
    for _ in range(SECONDS * 100):
        if condition():
            return
        ticker.wait(0.01)
    raise AssertionError("the condition never came true")


def test_room_waits_for_the_engine(make_engine):
    engine = make_engine(max_pending_tokens=50)
    engine.open("s")
    engine.append("s", STREAM * 5)
    engine.room("s").result(SECONDS)
    assert engine.session_stats("s").pending_tokens <= 50


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


BLOCK_BYTES = 16 * 4 * 2 * 8 * 8  # tokens x cells x (keys, values) x dimensions x fp64


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
    assert answer(engine, "s") == greedy_by_hand(tiny_lm, STREAM, 12)
    assert engine.stats().faults["disk.BlockDamaged"] > 0


def test_an_error_in_a_callback_ends_its_session_alone(make_engine):
    engine = make_engine()
    engine.open("s")
    engine.append("s", STREAM)

    def broken(token: int) -> bool:
        raise RuntimeError("callback")

    asked = Generation(SamplingParams(), broken)
    engine.generate("s", asked)
    with pytest.raises(Exception, match="internal error"):
        asked.done.result(SECONDS)
    engine.open("t")
    engine.append("t", STREAM)
    assert len(answer(engine, "t", 2)) == 2


def test_the_answer_is_the_same_with_the_past_on_disk_alone(make_engine, tmp_path, tiny_lm):
    engine = make_engine(cache=CacheConfig(directory=tmp_path, host_bytes=6 * BLOCK_BYTES))
    engine.open("s")
    engine.append("s", STREAM)
    assert answer(engine, "s") == greedy_by_hand(tiny_lm, STREAM, 12)
    assert engine.stats().past_bytes["host"] <= 6 * BLOCK_BYTES
