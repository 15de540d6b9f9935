"""Attention over [prefix | segment]: the fp64 reference against a literal loop, and `sdpa` against the reference."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from segcore.attention import choice
from segcore.attention.reference import reference_attention
from segcore.attention.sdpa import sdpa_attention
from segcore.errors import ConfigError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
ATTENTION = {"reference": reference_attention, "sdpa": sdpa_attention}
HEADS = {"mha": (4, 1), "gqa": (2, 3), "mqa": (1, 4)}
# Queries T and keys N: one query, the segment alone, a prefix before it, odd sizes.
SIZES = [(1, 1), (1, 7), (1, 130), (5, 5), (33, 33), (2, 3), (7, 20), (31, 97)]


def random_qkv(heads: int, group: int, tokens: int, keys: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens * 1000 + keys)
    shapes = [(heads, group, tokens, dim), (heads, keys, dim), (heads, keys, dim)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def literal_attention(q_HGTD: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
    heads, group, tokens, dim = q_HGTD.shape
    keys = k_HND.shape[1]
    out = torch.zeros_like(q_HGTD)
    for h in range(heads):
        for g in range(group):
            for t in range(tokens):
                seen = range(keys - tokens + t + 1)
                dots = [sum(q_HGTD[h, g, t, d].item() * k_HND[h, n, d].item() for d in range(dim)) for n in seen]
                powers = [math.exp(dot * scale) for dot in dots]
                for d in range(dim):
                    mixed = sum(p * v_HND[h, n, d].item() for p, n in zip(powers, seen, strict=True))
                    out[h, g, t, d] = mixed / sum(powers)
    return out


@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 4), (3, 3), (2, 5)])
def test_reference_equals_a_literal_loop(tokens, keys):
    q, k, v = random_qkv(2, 2, tokens, keys, 3, torch.float64)
    assert_close(reference_attention(q, k, v, 0.7), literal_attention(q, k, v, 0.7), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("tokens", "keys"), SIZES)
def test_sdpa_equals_the_reference(tokens, keys, heads, dtype):
    q, k, v = random_qkv(*HEADS[heads], tokens, keys, 16, dtype)
    got, want = sdpa_attention(q, k, v, 0.25), reference_attention(q.double(), k.double(), v.double(), 0.25)
    assert got.dtype == dtype
    assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dim", [1, 5, 12, 64])
def test_sdpa_equals_the_reference_at_odd_head_sizes(dim):
    q, k, v = random_qkv(2, 2, 5, 11, dim, torch.float64)
    assert_close(sdpa_attention(q, k, v, dim**-0.5), reference_attention(q, k, v, dim**-0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
def test_the_scale_counts_and_large_scores_stay_finite(name, scale):
    q, k, v = random_qkv(1, 2, 3, 9, 4, torch.float64)
    best = (q @ k[:, None].transpose(-1, -2) * scale).masked_fill(
        torch.ones(3, 9, dtype=torch.bool).triu(7), -torch.inf
    )
    assert_close(ATTENTION[name](q, k, v, scale), best.softmax(-1) @ v[:, None], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(("tokens", "keys"), [(4, 4), (4, 9), (2, 3)])
def test_keys_after_the_causal_limit_do_not_matter(name, tokens, keys):
    """Query t sees keys 0..N-T+t: overwrite all later ones, and its output is the same bit for bit."""
    q, k, v = random_qkv(2, 2, tokens, keys, 8, torch.float32)
    before = ATTENTION[name](q, k, v, 0.3)
    for t in range(tokens - 1):
        spoilt_k, spoilt_v = k.clone(), v.clone()
        spoilt_k[:, keys - tokens + t + 1 :] = 1e4
        spoilt_v[:, keys - tokens + t + 1 :] = -1e4
        after = ATTENTION[name](q, spoilt_k, spoilt_v, 0.3)
        assert torch.equal(after[:, :, : t + 1], before[:, :, : t + 1])
        assert not torch.equal(after[:, :, t + 1], before[:, :, t + 1])


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_nan_that_is_seen_never_passes_as_a_number(name, tokens):
    q, k, v = random_qkv(2, 2, tokens, 5, 8, torch.float32)
    k[1, 0, 0] = torch.nan
    out = ATTENTION[name](q, k, v, 0.3)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    with pytest.raises(AssertionError):
        assert_close(out, out)


@pytest.mark.parametrize("name", ATTENTION)
def test_inputs_stay_as_they_are_and_may_be_strided(name):
    torch.manual_seed(0)
    q_TGHD = torch.randn(3, 2, 2, 8, dtype=torch.float64)
    q = q_TGHD.permute(2, 1, 0, 3)
    k, v = torch.randn(2, 2, 9, 8, dtype=torch.float64)[:, :, 2:]
    copies = [x.clone() for x in (q, k, v)]
    assert_close(ATTENTION[name](q, k, v, 0.3), literal_attention(*copies, 0.3), rtol=0, atol=1e-12)
    one = ATTENTION[name](q[:, :, -1:], k, v, 0.3)
    assert_close(one, literal_attention(*copies, 0.3)[:, :, -1:], rtol=0, atol=1e-12)
    assert all(torch.equal(x, copy) for x, copy in zip((q, k, v), copies, strict=True))


@pytest.mark.parametrize("tokens", [1, 4, 6])
def test_gradients_equal_the_references(tokens):
    grads = []
    for attention in (sdpa_attention, reference_attention):
        leaves = [x.requires_grad_() for x in random_qkv(2, 2, tokens, 6, 4, torch.float64)]
        attention(*leaves, 0.5).square().sum().backward()
        grads.append([x.grad for x in leaves])
    for got, want in zip(*grads, strict=True):
        assert_close(got, want, rtol=0, atol=1e-11)


def test_an_attention_that_errs_or_fails_is_never_chosen(tiny_lm, monkeypatch, caplog):
    """What is wrong or NaN is left out however quick it is, and what raises too; the log says so."""

    def fails(*_):
        raise RuntimeError("no kernel")

    candidates = {
        "sdpa": sdpa_attention,
        "nan": lambda q, k, v, scale: q * math.nan,
        "unscaled": lambda q, k, v, scale: sdpa_attention(q, k, v, 1.0),
        "fails": fails,
    }
    slowness = {attention: i for i, attention in enumerate(reversed(candidates.values()))}
    monkeypatch.setattr(choice, "_milliseconds", lambda attention, *_: slowness[attention])
    assert choice._measured(candidates, tiny_lm.spec, 8, 20) is sdpa_attention
    assert [line for line in caplog.text.splitlines() if "left out" in line][2:] != []


def test_the_quickest_is_chosen_for_each_kind_of_pass(tiny_lm, monkeypatch):
    also = {"one": lambda *given: sdpa_attention(*given), "reference": reference_attention, "sdpa": sdpa_attention}
    monkeypatch.setattr(choice, "backends", lambda spec: also)
    quick = {("one", 1): 0, ("sdpa", 1): 1, ("one", 8): 1, ("sdpa", 8): 0}
    names = {attention: name for name, attention in also.items()}
    monkeypatch.setattr(choice, "_milliseconds", lambda attention, _, tokens, __: quick[names[attention], tokens])
    chosen = [choice._measured({n: also[n] for n in ("one", "sdpa")}, tiny_lm.spec, tokens, 20) for tokens in (8, 1)]
    assert chosen == [sdpa_attention, also["one"]]


def test_an_attention_by_name_must_be_there(tiny_lm):
    assert choice.make_attention("reference", tiny_lm.spec, 8, 20) is reference_attention
    with pytest.raises(ConfigError, match="attention='flash9' isn't there; choose 'auto' or one of reference, sdpa"):
        choice.make_attention("flash9", tiny_lm.spec, 8, 20)
