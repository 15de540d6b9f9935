"""Choosing by anchors, as published, against its literal steps."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segcore.retrieval import choose_by_anchors
from tests.segcore import literal


@st.composite
def choices(draw):
    """Whole numbers whose means are whole: exact in fp32, so choices must be equal, and ties are the rule."""
    groups = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    window, dim = draw(st.integers(1, 30)), draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    length, most = sum(sizes), draw(st.sampled_from([1, 4, 30]))
    first, stop = draw(st.integers(0, length)), draw(st.integers(0, length))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    queries = [840 * torch.randint(-2, 3, (group, window, dim), generator=random) for group in groups]
    keys = torch.randint(-most, most + 1, (len(groups), length, dim), generator=random)
    return queries, keys, sizes, {"first": first, "stop": stop, "tokens": 8 * draw(st.integers(0, 24))}


@settings(max_examples=200, deadline=None)
@given(choices(), st.sampled_from([torch.float64, torch.float32]))
def test_choice_by_anchors_equals_the_literal_steps_in_any_pieces(case, dtype):
    queries, keys_CND, sizes, limits = case
    pieces = keys_CND.to(dtype).split(sizes, dim=1)
    got = choose_by_anchors([q.to(dtype) for q in queries], iter(pieces), **limits)
    assert got.dtype == torch.long
    expected = [literal.anchors(q.tolist(), k.tolist(), **limits) for q, k in zip(queries, keys_CND, strict=True)]
    assert got.tolist() == expected


def anchors(scores, *, tokens, first=0, stop=None, summaries=((1.0,),)):
    keys = torch.tensor(scores, dtype=torch.float64)[None, :, None]
    queries = [torch.tensor(summaries, dtype=torch.float64)[None]]
    stop = len(scores) if stop is None else stop
    return choose_by_anchors(queries, [keys], first=first, stop=stop, tokens=tokens).tolist()[0]


def test_an_anchor_brings_three_before_and_four_after():
    scores = [0.0] * 40
    scores[20] = 1.0
    assert anchors(scores, tokens=8) == [*range(17, 25)]


def test_too_few_are_filled_with_the_earliest():
    scores = [0.0] * 40
    scores[20] = scores[21] = 1.0
    assert anchors(scores, tokens=16) == [*range(7), *range(17, 26)]
    assert anchors(scores, tokens=16, first=5) == [*range(5, 12), *range(17, 26)]
    assert anchors(scores, tokens=16, stop=22) == [*range(11), *range(17, 22)]
    assert anchors(scores, tokens=64) == [*range(40)]


def test_a_summary_names_sixteen_tokens():
    """Of the 20 anchors that R allows; the rest is filled."""
    scores = [float(i % 20 == 5) * (400 - i) for i in range(400)]
    around = {p for n in range(5, 320, 20) for p in range(n - 3, n + 5)}
    assert len(around) == 16 * 8
    filled = [p for p in range(400) if p not in around][: 4 * 8]
    assert anchors(scores, tokens=160) == sorted(around | set(filled))


def test_a_token_named_by_two_summaries_is_one_anchor_with_its_better_score():
    """Two query heads of one query each, hence two different summaries; every token is named by both."""
    keys = torch.zeros(1, 60, 2, dtype=torch.float64)
    keys[0, 10], keys[0, 30], keys[0, 50] = torch.tensor([[3.0, 3.0], [4.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    heads = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    # 30 scores 4, 10 scores 3 twice, 50 scores 2: the one anchor is 30.
    assert choose_by_anchors([heads], [keys], first=0, stop=60, tokens=8).tolist() == [[*range(27, 35)]]
