"""Sampling: which tokens may come, how often, and that (seed, index) alone decide."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segcore.engine.sampler import sample
from segcore.errors import InvalidRequest
from segcore.sampling import MAX_SEED, SamplingParams

PROBABILITIES = [0.05, 0.4, 0.15, 0.3, 0.1]
LOGITS = torch.tensor(PROBABILITIES, dtype=torch.float64).log()


def draws(logits, count=300, seed=0, **params):
    return [sample(logits, SamplingParams(seed=seed, **{"temperature": 1.0, **params}), i) for i in range(count)]


@settings(deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=20, unique=True), st.integers(0, MAX_SEED))
def test_greedy_takes_the_largest(logits, seed):
    params = SamplingParams(temperature=0.0, top_k=3, top_p=0.5, seed=seed)
    assert sample(torch.tensor(logits, dtype=torch.float32), params, 7) == logits.index(max(logits))


@pytest.mark.parametrize(
    ("params", "support"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 4}, {1, 2, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.01}, {1}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.71}, {1, 2, 3}),
        ({"top_p": 0.96}, {0, 1, 2, 3, 4}),
        ({"top_k": 3, "top_p": 0.8}, {1, 3}),  # of the three kept, 0.4 and 0.3 are 0.82
        ({"top_k": 3, "top_p": 0.83}, {1, 2, 3}),
        ({"temperature": 0.5, "top_p": 0.55}, {1}),  # squared and normalised: 0.561, 0.316, 0.079, 0.035, 0.009
        ({"temperature": 0.5, "top_p": 0.57}, {1, 3}),
        ({"temperature": 0.5, "top_p": 0.87}, {1, 3}),
        ({"temperature": 2.0, "top_p": 0.87}, {1, 2, 3, 4}),
    ],
)
def test_only_and_all_tokens_that_the_filters_keep_come(params, support):
    assert set(draws(LOGITS, **params)) == support


@pytest.mark.parametrize(
    ("temperature", "top_k", "dtype"),
    [
        (1.0, 0, torch.float32),
        (1.0, 0, torch.bfloat16),
        (0.5, 0, torch.float32),
        (3.0, 0, torch.float64),
        (1.0, 3, torch.float32),
    ],
)
def test_frequencies_match_the_probabilities(temperature, top_k, dtype):
    count = 1200
    drawn = draws(LOGITS.to(dtype), count, seed=5, temperature=temperature, top_k=top_k)
    weights = [p ** (1 / temperature) for p in PROBABILITIES]
    kept = sorted(weights)[-top_k:] if top_k else weights
    for token, weight in enumerate(weights):
        want = weight / sum(kept) if weight in kept else 0.0
        assert abs(drawn.count(token) / count - want) <= 4 * math.sqrt(want * (1 - want) / count)


@settings(deadline=None)
@given(st.integers(0, MAX_SEED), st.integers(0, 10**6))
def test_a_draw_depends_on_seed_and_index_alone(seed, index):
    params = SamplingParams(temperature=1.0, seed=seed)
    first = sample(LOGITS, params, index)
    torch.rand(3)
    before = torch.get_rng_state()
    assert sample(LOGITS, params, index) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_different_indices_and_seeds_draw_differently():
    """Also for neighbouring seeds, one of which must not be the other's stream shifted by some tokens."""
    flat = torch.zeros(20_000)
    streams = [draws(flat, 30, seed=seed) for seed in (0, 1, 2, MAX_SEED - 1, MAX_SEED)]
    assert all(len(set(stream)) >= 29 for stream in streams)
    everything = [token for stream in streams for token in stream]
    assert len(set(everything)) >= 145


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
def test_draws_follow_the_tokens_when_the_vocabulary_is_shuffled(order):
    shuffled = draws(LOGITS[order], 50)
    assert [order[token] for token in shuffled] == draws(LOGITS, 50)


def test_minus_infinity_never_comes():
    logits = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf])
    assert set(draws(logits)) == {0, 2}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1_000_001),
        ("max_tokens", math.nan),
        ("temperature", -0.1),
        ("temperature", 100.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", -1.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", 2**31 + 1),
        ("top_k", math.nan),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", math.nan),
        ("stop", ("",)),
        ("stop", ("good", "x" * 257)),
        ("stop", ("x",) * 17),
    ],
)
def test_bad_params_are_refused_by_name(name, value):
    with pytest.raises(InvalidRequest, match=f"^{name}=") as caught:
        SamplingParams(**{name: value})
    assert caught.value.details == {"field": name}


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 1},
        {"max_tokens": 1_000_000},
        {"temperature": 0.0},
        {"temperature": 100.0},
        {"top_p": 1.0},
        {"top_p": 1e-9},
        {"top_k": 0},
        {"top_k": 2**31},
        {"seed": MAX_SEED},
        {"stop": ("x" * 256,) * 16},
    ],
)
def test_limits_themselves_are_accepted_and_can_be_sampled(params):
    params = SamplingParams(**{"temperature": 1.0, **params})
    assert sample(LOGITS, params, 0) in range(5)
