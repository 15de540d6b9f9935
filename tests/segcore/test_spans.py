"""Spans, their index and what they elect, against literal readings of the design's section 11."""

from __future__ import annotations

import itertools
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segcore.spans import best_spans, index_vectors, span_scores, tile, votes
from tests.segcore import literal

# Few values, all exact in binary: sums are exact, and ties are the rule.
VALUES = [0.0, 0.0, 0.25, 0.5, 1.0, 4.0]
seeds = st.integers(0, 2**20)  # of what would take long to draw number by number


@st.composite
def texts(draw):
    """Attention between the tokens of a text, theta, and the lengths that a span may have."""
    tokens, least = draw(st.integers(1, 20)), draw(st.integers(1, 4))
    most = draw(st.integers(least, 7))
    chance = random.Random(draw(seeds))
    attention = [chance.choices(VALUES, k=i + 1) for i in range(tokens)]
    return attention, draw(st.sampled_from([0.0, 0.25, 0.75])), least, most


@settings(deadline=None)
@given(texts())
def test_scores_equal_the_literal_sum(text):
    attention, theta, least, most = text
    scores = span_scores(literal.band(attention, 2 * most), theta, least, most)
    expected = literal.span_scores(attention, theta, least, most)
    assert scores.shape == (len(attention), most - least + 1)
    for start, length in itertools.product(range(len(attention)), range(least, most + 1)):
        assert scores[start, length - least] == expected.get((start, length), -torch.inf)


@settings(deadline=None)
@given(texts(), st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.5, 0.9]))
def test_suppression_equals_the_literal_reading(text, overlap):
    _, _, least, _ = text
    expected = literal.span_scores(*text)
    scores = span_scores(literal.band(text[0], text[3]), *text[1:])
    assert list(best_spans(scores, least, overlap)) == literal.best_spans(expected, overlap)


def test_an_overlap_of_exactly_the_limit_is_allowed():
    """Spans of 64 and 65 tokens, 29 of them common, 100 in all: 29 / 100 is 0.29, though 0.29 * 100 is below 29."""
    scores = torch.full((100, 2), -torch.inf, dtype=torch.float64)
    scores[0, 0], scores[34, 1], scores[35, 1] = 3.0, 2.0, 1.0
    assert list(best_spans(scores, 64, 0.29)) == [(0, 64), (35, 65)]


@settings(deadline=None)
@given(texts(), st.sampled_from([0.0, 0.3, 0.9]))
def test_tiles_equal_the_literal_reading(text, overlap):
    attention, theta, least, most = text
    spans = list(best_spans(span_scores(literal.band(attention, most), theta, least, most), least, overlap))
    assert tile(spans, len(attention), least, most) == literal.tiles(spans, len(attention), least, most)


@st.composite
def scattered(draw):
    """Any spans at all, overlapping and with gaps: more than suppression would let through."""
    tokens, least = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    most = draw(st.integers(least, 12))
    starts = st.integers(0, tokens - 1)
    spans = draw(st.lists(st.tuples(starts, st.integers(1, most)), max_size=8))
    return [(s, min(n, tokens - s)) for s, n in spans], tokens, least, most


@settings(deadline=None, max_examples=300)
@given(scattered())
def test_tiles_cover_every_token_once_and_obey_the_lengths(case):
    spans, tokens, least, most = case
    tiles = tile(spans, tokens, least, most)
    assert tiles == literal.tiles(spans, tokens, least, most)
    assert sum(tiles) == tokens
    assert all(1 <= length <= most for length in tiles)
    if tokens >= least and most >= 2 * least - 1:
        assert min(tiles) >= least


@settings(deadline=None)
@given(texts(), st.integers(1, 5), seeds)
def test_index_vectors_equal_the_literal_reading(text, vote_tokens, seed):
    attention, theta, least, most = text
    lengths = tile(
        best_spans(span_scores(literal.band(attention, most), theta, least, most), least, 0.3), len(attention), 1, most
    )
    keys_HTD = torch.randint(-2, 4, (2, len(attention), 3), generator=torch.Generator().manual_seed(seed)).double()
    received = votes(literal.band(attention, 2 * most), lengths)
    assert received.tolist() == literal.votes(attention, lengths)
    vectors = index_vectors(keys_HTD, received, lengths, vote_tokens)
    expected = [literal.index_vectors(head, received.tolist(), lengths, vote_tokens) for head in keys_HTD.tolist()]
    torch.testing.assert_close(vectors, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


def test_index_vectors_of_half_precision_are_means_in_fp32():
    keys = torch.tensor([[[512.0], [8.0], [1.0]]], dtype=torch.bfloat16)
    vectors = index_vectors(keys, torch.zeros(3), [3], 4)
    assert vectors.dtype == torch.bfloat16
    assert vectors.item() == 174  # 521 / 3; in bf16 the sum would be 520, and a third of it 173
