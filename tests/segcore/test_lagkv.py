"""LagKV: which tokens of a lag are kept, against the published formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segcore.policies.lagkv import best_of_lag, score_lag
from tests.segcore import literal


@settings(max_examples=50, deadline=None)
@given(
    heads=st.integers(1, 3),
    lags=st.integers(1, 3),
    size=st.integers(2, 12),
    dim=st.integers(2, 6),
    keep=st.sampled_from([0.0, 0.2, 0.29, 0.5, 0.75, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_lags_keep_what_the_literal_loop_keeps(heads, lags, size, dim, keep, seed):
    random = torch.Generator().manual_seed(seed)
    k, v, next_k, next_v = torch.randn((4, heads, lags, size, dim), generator=random, dtype=torch.float64)
    scores = score_lag(k, v, next_k, next_v)
    kept = best_of_lag(scores, int(keep * size))
    for h in range(heads):
        for p in range(lags):
            lists = [z[h, p].tolist() for z in (k, v, next_k, next_v)]
            assert scores[h, p].tolist() == pytest.approx(literal.lag_scores(*lists), abs=1e-12)
            assert kept[h, p].tolist() == literal.kept_of_lag(*lists, keep)


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=3, max_size=40), st.floats(0.2, 0.8))
def test_ties_between_tokens_of_a_lag_go_to_the_earlier(scores, share):
    count = int(share * len(scores))
    assert best_of_lag(torch.tensor(scores), count).tolist() == literal.best_of_lag(scores, count)


def test_a_channel_that_is_constant_in_the_next_lag_singles_out_who_differs():
    k, next_k = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    k[:, 2] = next_k[:, 2] = 0.5
    assert score_lag(k, k, next_k, next_k).tolist() == pytest.approx(
        literal.lag_scores(*(z.tolist() for z in (k, k, next_k, next_k))), abs=1e-12
    )
    k[3, 2] = 0.6
    scores = score_lag(k, k, next_k, next_k)
    assert scores.isfinite().all()
    assert best_of_lag(scores, 1).tolist() == [3]


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_lags_are_scored_in_at_least_fp32(dtype, wide):
    lags = torch.randn(4, 2, 32, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    scores = score_lag(*lags)
    assert scores.dtype == wide
    torch.testing.assert_close(scores.double(), score_lag(*lags.double()), rtol=1e-5, atol=1e-7)


def test_a_lag_is_scored_with_gradient_but_chosen_without():
    with torch.inference_mode(False), torch.enable_grad():
        lags = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
        scores = score_lag(*lags)
        (gradient,) = torch.autograd.grad(scores.square().sum(), lags, retain_graph=True)
        assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()
        kept = lags[0][best_of_lag(scores, 3)]
        (gradient,) = torch.autograd.grad(kept.sum(), lags)
        assert gradient[0].sum(dim=1).tolist().count(4.0) == 3  # the kept keys, and nothing by way of the scores
        assert gradient.sum() == 12
