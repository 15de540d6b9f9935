"""Answers of the engine on its thread equal a plain loop over F, however the stream arrives."""

from __future__ import annotations

import pytest

from segcore.config import CacheConfig
from tests.conftest import tiny_segment
from tests.segcore.engine.loop import BLOCK_BYTES, by_hand
from tests.segcore.engines import SECONDS, STREAM, answer, generation


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


def test_the_answer_is_the_same_with_the_past_on_disk_alone(make_engine, tmp_path, tiny_lm):
    engine = make_engine(cache=CacheConfig(directory=tmp_path, host_bytes=6 * BLOCK_BYTES))
    engine.open("s")
    engine.append("s", STREAM)
    assert answer(engine, "s") == by_hand(tiny_lm, STREAM, 12)
    assert engine.stats().past_bytes["host"] <= 6 * BLOCK_BYTES
