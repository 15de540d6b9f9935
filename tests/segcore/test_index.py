"""Indexes of selector keys: the same past gives the same choice however it came, and the oracle's wherever promised."""

import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segcore.retrieval import INDEXES, choose_blocks, exhaustive, make_index, recall, score_tokens
from segcore.retrieval import base as index_base
from segcore.retrieval import pages as index_pages
from segcore.retrieval.base import IndexSpec
from segcore.retrieval.choose import best_of_blocks, nominate, score_pieces
from segcore.retrieval.lowrank import LowRankIndex, _compress, _window_max
from segcore.retrieval.pages import Pages

CPU = torch.device("cpu")
C, G, W, D, SEGMENT, BLOCK, TOKENS = 2, 3, 5, 16, 24, 4, 16


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    """Pages of four segments and scans of two at a time, so that short streams cross every boundary; levels of some."""
    monkeypatch.setattr(exhaustive, "LEVEL_KEYS", 20)
    monkeypatch.setattr(index_pages, "PAGE_ROWS", 4)
    monkeypatch.setattr("segcore.retrieval.exhaustive.PAGE_ROWS", 4)
    monkeypatch.setitem(index_base._SCRATCH_NUMBERS, "cpu", 2 * C * G * W * SEGMENT)


def spec(dtype=torch.float64, budget=2**30, head_dim=D, block=BLOCK, oversampling=2):
    return IndexSpec(
        selectors=C,
        head_dim=head_dim,
        dtype=dtype,
        device=CPU,
        block=block,
        device_budget_bytes=budget,
        oversampling=oversampling,
    )


def correlated(tokens, seed, dtype=torch.float64):
    """Keys and queries whose standard deviations fall off over random directions, as real ones' do, plus means."""
    rng = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(C, D, D, generator=rng, dtype=torch.float64))[0]
    std = 2 / (1 + (torch.arange(D) / 4.0) ** 6).sqrt()
    keys = (torch.randn(C, tokens, D, generator=rng, dtype=torch.float64) * std + 2) @ basis.mT
    queries = (torch.randn(C, G, W, D, generator=rng, dtype=torch.float64) * std + 1) @ basis.mT[:, None]
    return keys.to(dtype), [q.to(dtype) for q in queries]


@functools.cache
def segment_keys(seed):
    return correlated(SEGMENT, seed, torch.bfloat16)[0]


def filled(index, keys, segment=SEGMENT):
    for part in keys.split(segment, dim=1):
        index.append(part)
    return index


def oracle(keys, queries, oversampling=2, nominated=None, **limits):
    """The rule in plain words: blocks are nominated by products less levels, their tokens judged by shares."""
    first, stop, block = limits["first"], limits["stop"], limits["block"]
    if stop <= first or not limits["tokens"]:
        return []
    scale, step = keys.shape[-1] ** -0.5, math.ceil((stop - first) / exhaustive.LEVEL_KEYS)
    products = torch.zeros(keys.shape[1], dtype=torch.float64)
    for q_GWD, k_ND in zip(queries, keys, strict=True):
        scores = q_GWD @ k_ND.T * scale
        products += (scores - scores[..., first:stop:step].exp().sum(dim=-1, keepdim=True).log()).amax(dim=1).sum(dim=0)
    candidates = {}
    for position in range(first, stop):
        candidates.setdefault(position // block, []).append(position)
    if nominated is None:
        best = {b: max(products[positions]).item() for b, positions in candidates.items()}
        lent = {b: max([best[b], *(best[n] - 1e-3 for n in (b - 1, b + 1) if n in best)]) for b in best}
        most = oversampling * math.ceil(limits["tokens"] / block) + 2
        nominated = sorted(lent, key=lambda b: (-lent[b], b))[:most]
    judged = sorted(position for b in nominated for position in candidates[b])
    shares = torch.full((keys.shape[1],), -torch.inf, dtype=products.dtype)
    attention = [q @ k[judged].T * keys.shape[-1] ** -0.5 for q, k in zip(queries, keys, strict=True)]
    shares[judged] = torch.cat([scores.softmax(dim=-1).amax(dim=1) for scores in attention]).sum(dim=0).log()
    return choose_blocks(shares, **limits).tolist()


def limits_for(length, tokens=TOKENS, first=2, tail=3, block=BLOCK):
    return {"first": first, "stop": length - tail, "tokens": tokens, "block": block}


@st.composite
def pasts(draw):
    keys, queries = correlated(SEGMENT * draw(st.integers(1, 11)), draw(st.integers(0, 2**16)))
    length = keys.shape[1]
    first, stop = draw(st.integers(0, length)), draw(st.integers(0, length))
    return keys, queries, {"first": first, "stop": stop, "tokens": BLOCK * draw(st.integers(0, 5)), "block": BLOCK}


@settings(deadline=None)
@given(pasts(), st.sampled_from([0, 5000, 2**30]))
def test_the_exhaustive_index_is_the_oracle(case, budget):
    keys, queries, limits = case
    index = filled(INDEXES["exhaustive"](spec(budget=budget)), keys)
    chosen = index.search(queries, **limits)
    assert chosen.tolist() == oracle(keys, queries, **limits)
    assert chosen.dtype == torch.long


@settings(deadline=None)
@given(pasts(), st.sampled_from([0, 2000, 2**30]))
def test_i9_the_shipped_index_selects_what_the_oracle_selects_when_all_are_judged(case, budget):
    keys, queries, limits = case
    index = filled(LowRankIndex(spec(budget=budget, oversampling=2**20)), keys)
    assert index.search(queries, **limits).tolist() == oracle(keys, queries, oversampling=2**20, **limits)


@settings(deadline=None)
@given(pasts(), st.sampled_from([0, 2000, 2**30]), st.integers(0, 3))
def test_i9_what_is_nominated_is_judged_by_exact_keys(case, budget, misled):
    """Estimates that are all wrong say which blocks are judged, and nothing else."""
    keys, queries, limits = case
    index = filled(LowRankIndex(spec(budget=budget)), keys)
    index._codes = garbled(index._codes, torch.Generator().manual_seed(misled))
    nominated = None
    if limits["first"] < limits["stop"] and limits["tokens"]:
        nominated = index._all_nominated(first=limits["first"], stop=limits["stop"], tokens=limits["tokens"])
        if nominated is None:
            levels = index._exact.levels(queries, first=limits["first"], stop=limits["stop"])
            scores = torch.cat(list(index._estimates(queries, levels / D**-0.5))) * D**-0.5
            best = best_of_blocks([scores], first=limits["first"], stop=limits["stop"], block=BLOCK)
            nominated = nominate(best, index._most(limits["tokens"]))
        nominated = nominated.tolist()
    assert index.search(queries, **limits).tolist() == oracle(keys, queries, nominated=nominated, **limits)


def test_tokens_that_are_no_candidates_do_not_speak_for_their_block():
    """`first` and `stop` lie inside blocks, and the tokens just beyond them would take all of the attention."""
    keys, queries = correlated(4 * SEGMENT, 0)
    limits = {"first": 6, "stop": 4 * SEGMENT - 2, "tokens": TOKENS, "block": BLOCK}
    plain = oracle(keys, queries, **limits)
    keys[:, [5, 4 * SEGMENT - 2]] = 100 * queries[0].mean(dim=(0, 1))
    assert filled(INDEXES["exhaustive"](spec(budget=0)), keys).search(queries, **limits).tolist() == plain


def test_a_query_that_likes_every_key_decides_nothing():
    """Its products are the largest of all, and its attention is spread over everything."""
    keys = torch.zeros(1, 40 * SEGMENT, D, dtype=torch.float64)
    keys[0, :, 0] = 10 + torch.arange(40 * SEGMENT) % 7 / 10
    keys[0, 501, 1] = 4
    queries = torch.zeros(1, 1, 2, D, dtype=torch.float64)
    queries[0, 0, 0, 0], queries[0, 0, 1, 1] = 10, 10
    one = dataclasses.replace(spec(oversampling=2**20), selectors=1)
    chosen = filled(LowRankIndex(one), keys).search(list(queries), first=4, stop=900, tokens=TOKENS, block=BLOCK)
    assert score_tokens(list(queries), [keys], 1.0)[4:900].argmax() != 501 - 4
    assert set(range(500, 504)) <= set(chosen.tolist())


def test_blocks_without_candidates_stay_out():
    """Most blocks end before `first`, and the first token that is a candidate scores best of all."""
    keys, queries = correlated(8 * SEGMENT, 0)
    limits = limits_for(8 * SEGMENT, first=160)
    keys[:, 160] = 100 * queries[0].mean(dim=(0, 1))
    index = filled(LowRankIndex(spec()), keys)
    assert index.search(queries, **limits).tolist() == oracle(keys, queries, **limits)


def garbled(codes, rng):
    other = Pages(codes._row_shape, codes._dtype, CPU, codes._device_rows)
    for page in codes:
        for row in page:
            other.append(torch.randint(-127, 128, row.shape, generator=rng, dtype=torch.int8))
    return other


@pytest.mark.parametrize("name", INDEXES)
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_appends_forks_and_cuts_in_any_order_equal_a_fresh_index(name, data):
    """A random life of some indexes beside plain lists of segments: each searches as one built from its list."""
    budget = data.draw(st.sampled_from([0, 6000, 2**30]))
    index_spec = spec(torch.bfloat16, budget)
    lives = [(INDEXES[name](index_spec), [])]
    for seed in range(data.draw(st.integers(1, 25))):
        index, segments = lives[data.draw(st.integers(0, len(lives) - 1))]
        act = data.draw(st.sampled_from(["append", "append", "append", "fork", "cut"]))
        if act == "append":
            index.append(segment_keys(seed))
            segments.append(segment_keys(seed))
        elif act == "fork":
            lives.append((index.fork(), list(segments)))
        else:
            kept = data.draw(st.integers(0, len(segments)))
            index.truncate(kept * SEGMENT)
            del segments[kept:]
    _, queries = correlated(1, 99, torch.bfloat16)
    for index, segments in lives:
        assert index.length == len(segments) * SEGMENT
        if segments:
            fresh = filled(INDEXES[name](index_spec), torch.cat(segments, dim=1))
            limits = limits_for(index.length, tokens=BLOCK)
            assert torch.equal(index.search(queries, **limits), fresh.search(queries, **limits))


@settings(deadline=None)
@given(st.integers(1, 11), st.integers(0, 2**16), st.integers(1, 9))
def test_scans_in_pieces_estimate_what_one_scan_does(segments, seed, step):
    keys, queries = correlated(segments * SEGMENT, seed, torch.float32)
    index = filled(LowRankIndex(spec(torch.float32)), keys)
    pieces, levels = {}, torch.randn(C, G, W)
    for size in (step, 100):
        index_base._SCRATCH_NUMBERS["cpu"] = size * C * G * W * SEGMENT
        pieces[size] = torch.cat(list(index._estimates(queries, levels)))
    torch.testing.assert_close(pieces[step], pieces[100], atol=1e-4, rtol=1e-5)
    assert len(pieces[step]) == segments * SEGMENT
    exact = torch.cat(list(score_pieces(queries, [keys], 1.0, levels)))
    assert (pieces[step] - exact).abs().mean() < 0.3 * exact.std()  # of 4,000 seeds 0.05 in the median, 0.204 at most


def test_blocks_need_not_end_where_segments_do():
    keys, queries = correlated(8 * SEGMENT, 5)
    limits = limits_for(8 * SEGMENT, tokens=21, block=7)
    for kind in INDEXES.values():
        index = filled(kind(spec(block=7, oversampling=6)), keys)
        assert index.search(queries, **limits).tolist() == oracle(keys, queries, oversampling=6, **limits)


def realistic(tokens, seed):
    """Keys of the default model's shape and spectrum, and queries that look everywhere: the hardest to rank."""
    rng = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(2, 64, 64, generator=rng))[0]
    std = 2 / (1 + (torch.arange(64) / 14) ** 6).sqrt()
    mean = 15 * torch.nn.functional.normalize(torch.randn(2, 1, 64, generator=rng) * std, dim=-1)
    keys = mean + torch.randn(2, tokens, 64, generator=rng) * std
    queries = torch.randn(2, 3, 64, 64, generator=rng) * std
    return (keys @ basis.mT).bfloat16(), list((queries @ basis.mT[:, None]).bfloat16())


def test_recall_and_memory_of_the_shipped_index(monkeypatch):
    """With half of its nominees: at this length all of them would hide a bad estimate."""
    monkeypatch.setattr(index_pages, "PAGE_ROWS", 64)
    monkeypatch.setattr("segcore.retrieval.exhaustive.PAGE_ROWS", 64)
    monkeypatch.setitem(index_base._SCRATCH_NUMBERS, "cpu", 2**20)
    length, recall = 32768, []
    limits = {"first": 4, "stop": length - 256, "tokens": 512, "block": 16}
    default = spec(torch.bfloat16, head_dim=64, block=16, oversampling=8)
    for seed in range(3):
        keys, queries = realistic(length, seed)
        shipped = filled(LowRankIndex(default), keys, 1024)
        exact = filled(INDEXES["exhaustive"](default), keys, 1024)
        right = exact.search(queries, **limits)
        recall.append(torch.isin(right, shipped.search(queries, **limits)).float().mean().item())
        assert shipped.device_bytes <= 64 * length
        assert shipped.host_bytes == exact.device_bytes == 256 * length
        assert exact.host_bytes == 0
    assert min(recall) >= 0.85, recall


@pytest.mark.parametrize(("name", "budget"), [("exhaustive", 30_000), ("lowrank", 5_000)])
def test_the_device_budget_is_kept(name, budget):
    keys, _ = correlated(11 * SEGMENT, 0)
    plenty, tight = (filled(INDEXES[name](spec(budget=most)), keys) for most in (2**30, budget))
    assert 0 < tight.device_bytes <= budget < plenty.device_bytes
    assert tight.device_bytes + tight.host_bytes == plenty.device_bytes + plenty.host_bytes


@pytest.mark.parametrize("name", INDEXES)
def test_a_fork_shares_full_pages(name):
    index = filled(INDEXES[name](spec()), correlated(4 * SEGMENT, 0)[0])
    twin = index.fork()
    twin.append(correlated(SEGMENT, 1)[0])
    pages = [table for table in vars(index._exact if name == "lowrank" else index).values() if isinstance(table, Pages)]
    twins = [table for table in vars(twin._exact if name == "lowrank" else twin).values() if isinstance(table, Pages)]
    assert all(a.page(0) is b.page(0) for a, b in zip(pages, twins, strict=True))


@pytest.mark.parametrize("name", INDEXES)
def test_a_cut_into_a_page_that_a_fork_reads_leaves_the_fork_alone(name):
    keys, queries = correlated(10 * SEGMENT, 0)
    index = filled(INDEXES[name](spec()), keys[:, : 8 * SEGMENT])
    twin = index.fork()
    filled(index, keys[:, 8 * SEGMENT :])
    index.truncate(5 * SEGMENT)
    others = correlated(3 * SEGMENT, 1)[0]
    filled(index, others)
    limits = limits_for(8 * SEGMENT, first=5 * SEGMENT)
    now = torch.cat([keys[:, : 5 * SEGMENT], others], dim=1)
    assert twin.search(queries, **limits).tolist() == oracle(keys, queries, **limits)
    assert index.search(queries, **limits).tolist() == oracle(now, queries, **limits)


def test_keys_are_detached():
    keys = correlated(SEGMENT, 0)[0].requires_grad_()
    for name in INDEXES:
        index = filled(INDEXES[name](spec()), keys)
        assert not next(iter(index._exact._keys if name == "lowrank" else index._keys)).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shift", [-9.0, 0.0, 9.0])
def test_window_max_is_the_maximum(dtype, shift):
    similarity = (torch.randn(4, 3, 8, 50, generator=torch.Generator().manual_seed(0)) + shift).to(dtype)
    similarity[0, 0, :, 0] = -0.0
    assert torch.equal(_window_max(similarity), similarity.amax(dim=2))


def test_codes_of_all_directions_give_the_keys_back():
    keys, _ = correlated(SEGMENT, 3, torch.float32)
    codes, decoder = _compress(keys, D)
    torch.testing.assert_close((decoder @ codes.float()).mT, keys, atol=0.1, rtol=0)
    zero, decoder = _compress(torch.zeros(C, SEGMENT, D), 3)
    assert not (decoder @ zero.float()).any()


def test_a_segment_of_another_length_is_refused():
    for name in INDEXES:
        index = filled(INDEXES[name](spec()), correlated(SEGMENT, 0)[0])
        with pytest.raises(AssertionError):
            index.append(correlated(SEGMENT - 1, 0)[0])
        with pytest.raises(AssertionError):
            index.truncate(SEGMENT - 1)


def test_every_index_is_made_by_name():
    for name, kind in INDEXES.items():
        own = ("device_budget_bytes", "oversampling", "recall")
        made = make_index(name, **{k: v for k, v in dataclasses.asdict(spec()).items() if k not in own})
        assert type(made) is kind
        assert (made.length, made.device_bytes, made.host_bytes) == (0, 0, 0)


def test_recall_is_measured_while_it_serves(monkeypatch):
    """At one search of so many, with what the oracle chooses; an index that misses is seen to."""
    monkeypatch.setattr(recall, "EVERY", 3)
    keys, queries = correlated(64 * SEGMENT, 0)
    shipped = spec()
    index, limits = filled(LowRankIndex(shipped), keys), limits_for(64 * SEGMENT)
    for _ in range(4):
        chosen = index.search(queries, **limits).tolist()
    expected = oracle(keys, queries, **limits)
    found = 2 * len(set(chosen) & set(expected))
    assert shipped.recall.counts == {"index.chosen": 2 * len(expected), "index.found": found}
    for codes in index._codes:
        codes.zero_()
    for _ in range(3):
        index.search(queries, **limits)
    counts = shipped.recall.counts
    assert counts["index.chosen"] == 3 * len(expected)
    assert counts["index.found"] < found + len(expected)
