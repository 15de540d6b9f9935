"""The engine on its thread: order, fairness, limits, aborts, failures; tokens equal a plain loop over F."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from segcore.config import CacheConfig, FullConfig
from segcore.engine import steps
from segcore.engine.engine import Engine
from segcore.engine.request import Generation, Step
from segcore.engine.runner import Runner
from segcore.engine.sampler import sample
from segcore.errors import (
    AlreadyExists,
    BlockMissing,
    Busy,
    Cancelled,
    ConfigError,
    FailedPrecondition,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    SegcoreError,
    SessionFailed,
    StorageFull,
)
from segcore.model import CausalLM
from segcore.pastkv.manager import PastKVManager
from segcore.pastkv.session import SessionPast
from segcore.sampling import SamplingParams
from segcore.segments import tokens_to_next_cut
from tests.conftest import VOCABULARY, tiny_segment
from tests.segcore.engines import SECONDS, answer, ask, at_rest, engine_of, generation, turns

STREAM = torch.randint(0, VOCABULARY, (90,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(autouse=True)
def _leaves_nothing(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob("engine-*"))


@pytest.fixture
def make_engine(_leaves_nothing, tiny_lm, tmp_path, running) -> Callable[..., Engine]:
    return lambda **changes: running(engine_of(tiny_lm, **{"cache": CacheConfig(directory=tmp_path)} | changes))


def by_hand(lm: CausalLM, stream: list[int], count: int, marks: tuple[int, ...] = (), **params: object) -> list[int]:
    """The same answer by a plain loop: the stream, in passes that end at marks too, then token by token."""
    config, sampling = tiny_segment(), SamplingParams(**params)  # type: ignore[arg-type]
    runner = Runner(lm, config)
    state, past = runner.begin(), PastKVManager(CacheConfig()).open_stream(runner.policy.layout)
    tokens: list[int] = []
    with torch.inference_mode():
        for end in (*marks, len(stream)):
            while state.length < end:
                step = min(tokens_to_next_cut(state.filled, config, 8), end - state.length)
                logits = runner.advance(torch.tensor(stream[state.length : state.length + step]), state, past)
            if end in marks:
                runner.mark(state, past)
        while True:
            tokens.append(sample(logits[-1], sampling, len(tokens)))
            if len(tokens) == count:
                return tokens
            logits = runner.advance(torch.tensor(tokens[-1:]), state, past)


@pytest.mark.parametrize("piece", [1, 7, 90])
def test_an_answer_equals_a_plain_loop_however_the_stream_arrives(make_engine, tiny_lm, piece):
    engine = make_engine()
    engine.open("s")
    for i in range(0, len(STREAM), piece):
        engine.append("s", STREAM[i : i + piece])
    assert answer(engine, "s") == by_hand(tiny_lm, STREAM, 12)


def test_a_mark_is_a_refresh_point_where_it_stands(make_engine, tiny_lm):
    marks = (37, 70)
    expected = by_hand(tiny_lm, STREAM[:75], 12, marks)
    engine = make_engine()
    engine.open("s")
    for start, end in zip((0, *marks), (*marks, 75), strict=True):
        engine.append("s", STREAM[start:end])
        if end in marks:
            engine.mark("s")
    assert answer(engine, "s") == expected != by_hand(tiny_lm, STREAM[:75], 12)


def test_refresh_points_are_marks_at_fixed_places(make_engine, tiny_lm):
    places = tuple(at for at in range(1, 91) if at % 16 in (5, 10, 15))
    engine = make_engine(segment=tiny_segment(refresh_tokens=5))
    engine.open("s")
    engine.append("s", STREAM)
    assert answer(engine, "s", 5) == by_hand(tiny_lm, STREAM, 5, places) != by_hand(tiny_lm, STREAM, 5)


def test_a_sampled_answer_draws_anew_for_each_token(make_engine, tiny_lm):
    engine = make_engine()
    engine.open("s")
    engine.append("s", STREAM)
    params = {"temperature": 3.0, "seed": 5}
    assert answer(engine, "s", **params) == by_hand(tiny_lm, STREAM, 12, **params)


def test_what_was_answered_is_part_of_the_stream(make_engine, tiny_lm):
    engine = make_engine()
    engine.open("s")
    engine.append("s", STREAM)
    first = answer(engine, "s")
    engine.append("s", STREAM[:20])
    engine.flush("s").result(SECONDS)
    assert engine.session_stats("s").tokens == len(STREAM) + 12 + 20
    assert answer(engine, "s", 4) == by_hand(tiny_lm, STREAM + first + STREAM[:20], 4)


def test_what_comes_while_it_answers_stands_after_the_answer(make_engine, tiny_lm):
    engine = make_engine()
    engine.open("s")
    engine.append("s", STREAM)
    first = answer(engine, "s", at_token=lambda count: engine.append("s", STREAM[count : count + 5]))
    stream = STREAM + first + [token for count in range(1, 13) for token in STREAM[count : count + 5]]
    assert answer(engine, "s", 4) == by_hand(tiny_lm, stream, 4)


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
    assert got == {name: by_hand(tiny_lm, stream, 12) for name, stream in streams.items()}


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


def test_the_answer_is_the_same_with_the_past_on_disk_alone(make_engine, tmp_path, tiny_lm):
    engine = make_engine(cache=CacheConfig(directory=tmp_path, host_bytes=6 * BLOCK_BYTES))
    engine.open("s")
    engine.append("s", STREAM)
    assert answer(engine, "s") == by_hand(tiny_lm, STREAM, 12)
    assert engine.stats().past_bytes["host"] <= 6 * BLOCK_BYTES
