"""Choosing the retrieved prefix, against a literal reading of the design's section 6, `global`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segcore.config import CacheConfig
from segcore.engine.runner import Runner
from segcore.pastkv.manager import PastKVManager
from segcore.retrieval import NEIGHBOUR_MARGIN, choose_blocks, score_tokens
from tests.conftest import tiny_segment


def literal_scores(queries, keys, scale):
    """Sum, over all query heads, of the largest dot product of a past token with any query of the window."""
    scores = []
    for n in range(len(keys[0])):
        total = 0.0
        for heads, selector_keys in zip(queries, keys, strict=True):
            for window in heads:
                total += max(sum(a * b for a, b in zip(query, selector_keys[n], strict=True)) for query in window)
        scores.append(total * scale)
    return scores


def literal_choice(scores, first, stop, tokens, block):
    """Blocks of the stream that hold a candidate; each worth its best candidate, or a neighbour's less a hair.

    Their candidates, the best block's first, until there are `tokens`.
    """
    best = {}
    for position in range(first, stop):
        best[position // block] = max(scores[position], best.get(position // block, scores[position]))
    worth = {b: max([s] + [best[n] - NEIGHBOUR_MARGIN for n in (b - 1, b + 1) if n in best]) for b, s in best.items()}
    winners = sorted(worth, key=lambda b: (-worth[b], b))
    return sorted([p for b in winners for p in range(b * block, (b + 1) * block) if first <= p < stop][:tokens])


def choose(scores, **limits):
    return choose_blocks(torch.tensor(scores, dtype=torch.float64), **limits).tolist()


@st.composite
def cases(draw):
    block = draw(st.integers(1, 7))
    length = draw(st.integers(0, 60))
    first = draw(st.integers(0, length))
    stop = draw(st.integers(0, length))
    # Few different values, so that ties are the rule; some differ by less than the margin.
    value = st.sampled_from([-3.0, -1.0, 0.0, 2.0, 2.0 + NEIGHBOUR_MARGIN / 2, 2.0 + 2 * NEIGHBOUR_MARGIN, 500.0])
    scores = draw(st.lists(value, min_size=length, max_size=length))
    return scores, {"first": first, "stop": stop, "tokens": block * draw(st.integers(0, 6)), "block": block}


@settings(deadline=None)
@given(cases())
def test_choice_equals_the_literal_reading(case):
    scores, limits = case
    assert choose(scores, **limits) == literal_choice(scores, **limits)


@settings(deadline=None)
@given(cases())
def test_choice_keeps_its_promises(case):
    """R, or all that there are; ascending, no duplicates, candidates only, of as few blocks as that takes."""
    scores, limits = case
    first, stop, block = limits["first"], limits["stop"], limits["block"]
    chosen = choose(scores, **limits)
    assert len(chosen) == min(limits["tokens"], max(stop - first, 0))
    assert chosen == sorted(set(chosen))
    assert all(first <= p < stop for p in chosen)
    assert len({p // block for p in chosen}) <= limits["tokens"] // block + 2


@settings(deadline=None)
@given(cases(), st.floats(-9.0, 9.0))
def test_scores_of_non_candidates_do_not_matter(case, garbage):
    scores, limits = case
    spoilt = [s if limits["first"] <= p < limits["stop"] else garbage * 1e6 for p, s in enumerate(scores)]
    assert choose(spoilt, **limits) == choose(scores, **limits)


def block_scores(*best, block=4):
    """Scores of a stream whose blocks hold these values at their last token, and little elsewhere."""
    return [s for b in best for s in [-100.0] * (block - 1) + [b]]


@pytest.mark.parametrize(
    ("best", "blocks", "chosen"),
    [
        ((0, 9, 0, 5, 0), 1, [1]),
        ((0, 9, 0, 5, 0), 2, [0, 1]),  # neighbours come before a worse block; the earlier one first
        ((0, 9, 0, 5, 0), 3, [0, 1, 2]),
        ((0, 9, 0, 5, 0), 4, [0, 1, 2, 3]),
        ((0, 9, 0, 8.9995, 0), 3, [0, 1, 3]),  # 8.9995 is better than 9 less a hair
        ((7, 7, 7, 7, 7), 2, [0, 1]),
        ((1, 0, 0, 0, 9), 2, [3, 4]),  # the last block has one neighbour, and it isn't the first block
        ((9, 0, 0, 0, 1), 2, [0, 1]),
    ],
)
def test_neighbours_and_ties(best, blocks, chosen):
    got = choose(block_scores(*best), first=0, stop=20, tokens=4 * blocks, block=4)
    assert got == [p for b in chosen for p in range(4 * b, 4 * b + 4)]


def test_a_neighbour_without_candidates_lends_and_gets_nothing():
    scores = block_scores(9, 0, 0, 5, 9)
    got = choose(scores, first=4, stop=16, tokens=8, block=4)
    assert got == [*range(8, 16)]


def test_blocks_are_aligned_to_the_stream_and_cut_at_the_candidates():
    scores = [0.0] * 32
    scores[5], scores[29] = 2.0, 3.0
    assert choose(scores, first=4, stop=31, tokens=32, block=16) == [*range(4, 31)]
    assert choose(scores, first=4, stop=31, tokens=16, block=16) == [4, *range(16, 31)]


@pytest.mark.parametrize("limits", [(4, 4, 8), (8, 3, 8), (0, 16, 0)])
def test_nothing_to_choose_is_an_empty_choice(limits):
    first, stop, tokens = limits
    chosen = choose_blocks(torch.ones(16), first=first, stop=stop, tokens=tokens, block=4)
    assert chosen.shape == (0,)
    assert chosen.dtype == torch.long


def test_margin_survives_fp32_beside_scores_of_hundreds():
    scores = torch.full((20,), 500.0)
    scores[9] = 500.0005  # better than every other block, by less than the hair it loses when lent
    chosen = choose_blocks(scores, first=0, stop=20, tokens=8, block=4)
    assert chosen.tolist() == [*range(4), *range(8, 12)]


def whole_numbers(*shape, seed):
    """Small whole numbers: sums and products of them are exact in every precision, so results must be equal."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


@st.composite
def scorings(draw):
    groups = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    window, dim = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**20))
    queries = [whole_numbers(group, window, dim, seed=seed + i) for i, group in enumerate(groups)]
    return queries, whole_numbers(len(groups), sum(sizes), dim, seed=seed + 9), sizes


@settings(deadline=None)
@given(scorings(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_scores_equal_the_literal_reading_in_any_pieces(case, dtype):
    queries, keys_CND, sizes = case
    pieces = keys_CND.to(dtype).split(sizes, dim=1)
    got = score_tokens([q.to(dtype) for q in queries], iter(pieces), 0.5)
    assert got.tolist() == literal_scores([q.tolist() for q in queries], keys_CND.tolist(), 0.5)
    assert torch.equal(got, score_tokens([q.to(dtype) for q in queries], [keys_CND.to(dtype)], 0.5))


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_scores_accumulate_in_at_least_fp32(dtype, wide):
    """257 isn't a bfloat16."""
    got = score_tokens([torch.ones(1, 1, 257, dtype=dtype)], [torch.ones(1, 1, 257, dtype=dtype)], 1.0)
    assert got.dtype == wide
    assert got.tolist() == [257.0]


def test_selectors_and_keys_must_match_in_number():
    with pytest.raises(ValueError, match="zip"):
        score_tokens([torch.ones(1, 1, 4)] * 2, [torch.ones(1, 3, 4)], 1.0)


def test_inside_a_segment_a_questions_own_queries_choose(tiny_lm):
    """And where a segment starts all of the window's."""
    runner = Runner(tiny_lm, tiny_segment(question_tokens=3))
    state, past = runner.begin(), PastKVManager(CacheConfig()).open_stream(runner.policy.layout)
    windows = {}
    with torch.inference_mode():
        for count in (16, 16, 5):
            runner.advance(torch.arange(count), state, past)
            windows[state.length] = runner.policy.looking(state)
    assert [q.shape[1] for q in windows[32]] == [6, 6]
    assert [q.shape[1] for q in windows[37]] == [3, 3]
    for q_GWD, latest_GWD in zip(windows[37], state.queries, strict=True):
        assert torch.equal(q_GWD, latest_GWD[:, -3:])
