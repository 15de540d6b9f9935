"""The invariants of the design (section 10): I1, I2, I3, I8, I10, in fp64 on tiny random models, for every policy."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segcore.config import (
    CacheConfig,
    Cell,
    DuoConfig,
    FullConfig,
    LagKVConfig,
    LongGenConfig,
    SegmentConfig,
    SegmentedConfig,
    StreamingConfig,
)
from segcore.engine.runner import Runner
from segcore.model import CausalLM
from segcore.pastkv.manager import PastKVManager
from segcore.policies import POLICIES
from segcore.segments import tokens_to_next_cut
from segcore.state import State
from tests.conftest import FAMILIES, VOCABULARY, tiny_model, tiny_segment, tiny_spans

EXACT = {"rtol": 0.0, "atol": 1e-10}
MATRIX = {
    "full": FullConfig(segment_tokens=16),
    "streaming": StreamingConfig(segment_tokens=16, sink_tokens=2, window_tokens=11),
    "segmented": tiny_segment(),
    "segmented-some-readers": tiny_segment(readers=(Cell(0, 0), Cell(1, 0), Cell(1, 1))),
    "segmented-no-sinks": tiny_segment(sink_tokens=0, reader_tail_tokens=0),
    "segmented-refreshing": tiny_segment(refresh_tokens=5, question_tokens=3),
    "segmented-rereading": tiny_segment(reread_tokens=6, question_tokens=2),
    "segmented-long-tail": tiny_segment(segment_tokens=8, tail_tokens=20, reader_tail_tokens=12),
    "segmented-local-only": tiny_segment(retrieved_tokens=0, selectors=()),
    "segmented-paper": tiny_segment(
        selection="cell",
        selectors=(),
        sink_tokens=0,
        reader_tail_tokens=0,
        tail_tokens=8,
        readers=(Cell(1, 0),),
        segment_only=(Cell(0, 0),),
    ),
    "longgen": LongGenConfig(segment_tokens=16, full_layers=(1,), sink_tokens=3, window_tokens=9),
    "longgen-strided": LongGenConfig(
        segment_tokens=16, full_layers=(1,), sink_tokens=0, window_tokens=7, stride_blocks=3, block_tokens=5
    ),
    "duo": DuoConfig(segment_tokens=16, retrieval=(Cell(0, 1), Cell(1, 0)), sink_tokens=3, window_tokens=9),
    "lagkv": LagKVConfig(segment_tokens=16, sink_tokens=3, lag_tokens=8, keep=0.5),
    "lagkv-uneven": LagKVConfig(segment_tokens=16, sink_tokens=0, lag_tokens=6, keep=0.4),
    "lagkv-long-lags": LagKVConfig(segment_tokens=16, sink_tokens=20, lag_tokens=24, keep=0.25),
    "ltri": tiny_spans(),
    "ltri-small-windows": tiny_spans(local_tokens=8, selectors=(Cell(0, 0), Cell(0, 1)), refresh_tokens=5),
}
# Streams cross many boundaries and aren't multiples of the segment.
STREAM = torch.randint(0, VOCABULARY, (133,), generator=torch.Generator().manual_seed(3))
MARKS = (21, 37, 64, 101)

pytestmark = pytest.mark.usefixtures("no_gradients")


@dataclass
class Pass:
    """What a pass over a stream left: logits of every token, what was retrieved after each step, the state."""

    logits_TV: Tensor
    retrieved: dict[int, list[int]]
    state: State


def run(lm: CausalLM, config: SegmentConfig, stream_T: Tensor, marks: tuple[int, ...] = (), step: int = 10**9) -> Pass:
    """Run a stream through F in steps of at most `step` tokens; marks stand before the token of that index."""
    runner = Runner(lm, config)
    state, past = runner.begin(), PastKVManager(CacheConfig()).open_stream(runner.policy.layout)
    logits, retrieved = [], {}
    while state.length < len(stream_T):
        at = state.length
        if at in marks:
            runner.mark(state, past)
        next_mark = min((m for m in marks if m > at), default=len(stream_T))
        count = min(tokens_to_next_cut(state.filled, config, step), next_mark - at, len(stream_T) - at, step)
        logits.append(runner.advance(stream_T[at : at + count], state, past, all_logits=True))
        retrieved[at] = state.retrieved_CR.tolist()
    return Pass(torch.cat(logits), retrieved, state)


@functools.cache
def prefilled(lm: CausalLM, policy: str) -> Pass:
    """The whole stream, in passes as long as its marks and segments allow."""
    return run(lm, MATRIX[policy], STREAM, MARKS)


def test_every_policy_is_in_the_matrix():
    assert {config.policy for config in MATRIX.values()} == set(POLICIES)


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_i1_a_stream_within_a_segment_is_the_models_own_attention(family, kv_heads):
    stream, own = STREAM[:45], tiny_model(family, kv_heads=kv_heads)
    lm = CausalLM(tiny_model(family, kv_heads=kv_heads))

    @functools.cache
    def own_logits(first: int) -> Tensor:
        positions = torch.arange(first, first + len(stream))
        return own(stream[None], position_ids=positions[None]).logits[0]

    for config in MATRIX.values():
        config = within_model(dataclasses.replace(config, segment_tokens=48), kv_heads)
        ours = run(lm, config, stream, marks=(17,))
        torch.testing.assert_close(ours.logits_TV, own_logits(ours.state.layers[0][0].position), **EXACT)


def within_model(config: SegmentConfig, kv_heads: int) -> SegmentConfig:
    """The configuration with the cells that a model of fewer KV heads has."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    cells = {n: v for n, v in fields.items() if isinstance(v, tuple) and v and isinstance(v[0], Cell)}
    fewer = {name: tuple(Cell(c.layer, min(c.kv_head, kv_heads - 1)) for c in value) for name, value in cells.items()}
    if "segment_only" in fewer:
        fewer["segment_only"] = tuple(set(fewer["segment_only"]) - set(fewer.get("readers", ())))
    return dataclasses.replace(config, **fewer)


def test_i1_full_equals_the_model_over_many_segments(tiny_lm):
    own = tiny_model()(STREAM[None]).logits[0]
    torch.testing.assert_close(run(tiny_lm, MATRIX["full"], STREAM).logits_TV, own, **EXACT)


@pytest.mark.parametrize("policy", MATRIX)
def test_i2_prefill_equals_token_by_token_decode(tiny_lm, policy):
    whole = prefilled(tiny_lm, policy)
    single = run(tiny_lm, MATRIX[policy], STREAM, MARKS, step=1)
    torch.testing.assert_close(single.logits_TV, whole.logits_TV, **EXACT)
    shared = whole.retrieved.keys() & single.retrieved.keys()
    ends = {at: chosen for at, chosen in single.retrieved.items() if at + 1 in whole.retrieved or at == len(STREAM) - 1}
    assert shared
    # After the step that ends where a step of the other pass ended, both have chosen the same.
    starts = sorted(whole.retrieved)
    for start, end in zip(starts, [*starts[1:], len(STREAM)], strict=True):
        assert whole.retrieved[start] == ends[end - 1]


@settings(max_examples=25, deadline=None)
@given(
    policy=st.sampled_from(sorted(MATRIX)),
    length=st.integers(1, 133),
    step=st.integers(1, 40),
    marks=st.sets(st.integers(0, 132), max_size=4),
)
def test_i3_any_chopping_gives_the_same_state_and_logits(tiny_lm, policy, length, step, marks):
    stream, marks = STREAM[:length], tuple(sorted(marks))
    whole, chopped = run(tiny_lm, MATRIX[policy], stream, marks), run(tiny_lm, MATRIX[policy], stream, marks, step)
    torch.testing.assert_close(chopped.logits_TV, whole.logits_TV, **EXACT)
    assert_same_state(chopped.state, whole.state)


def assert_same_state(a: State, b: State) -> None:
    assert (a.length, a.filled) == (b.length, b.filled)
    assert a.retrieved_CR.tolist() == b.retrieved_CR.tolist()
    for windows_a, windows_b in zip(a.layers, b.layers, strict=True):
        for x, y in zip(windows_a, windows_b, strict=True):
            assert (x.heads, x.position, x.base - x.start) == (y.heads, y.position, y.base - y.start)
            live = slice(x.start, x.base + a.filled)
            torch.testing.assert_close(x.rotated_HND[:, live], y.rotated_HND[:, live], **EXACT)
            torch.testing.assert_close(x.k_HND[:, live], y.k_HND[:, live], **EXACT)
            torch.testing.assert_close(x.v_HND[:, live], y.v_HND[:, live], **EXACT)
    for x, y in zip(a.queries, b.queries, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


@settings(max_examples=20, deadline=None)
@given(policy=st.sampled_from(sorted(MATRIX)), at=st.integers(1, 132), token=st.integers(0, VOCABULARY - 1))
def test_i8_no_value_depends_on_a_future_token(tiny_lm, policy, at, token):
    perturbed = STREAM.clone()
    perturbed[at] = (perturbed[at] + 1 + token) % VOCABULARY
    before, after = prefilled(tiny_lm, policy), run(tiny_lm, MATRIX[policy], perturbed, MARKS)
    # A chunk's matrices differ in a later row only; equality is to the last bit.
    assert torch.equal(before.logits_TV[:at], after.logits_TV[:at])


@pytest.mark.parametrize("policy", [name for name, config in MATRIX.items() if POLICIES[config.policy].bounded])
def test_i10_state_bytes_do_not_grow(tiny_lm, policy):
    config = MATRIX[policy]
    stream = STREAM.repeat(3)[: 40 + 16 * 16]  # both end at the same place in a segment
    assert run(tiny_lm, config, stream).state.nbytes == run(tiny_lm, config, STREAM[:40]).state.nbytes


def test_the_past_matters(tiny_lm):
    """Retrieval changes what comes after it: else the other tests would prove nothing about it."""
    with_past, without = run(tiny_lm, MATRIX["segmented"], STREAM), run(tiny_lm, MATRIX["segmented-local-only"], STREAM)
    assert (with_past.logits_TV[-1] - without.logits_TV[-1]).abs().max() > 1e-3
    assert with_past.state.retrieved_CR.shape[1] == MATRIX["segmented"].retrieved_tokens


def test_a_mark_chooses_anew_without_closing_the_segment(tiny_lm):
    plain, marked = run(tiny_lm, MATRIX["segmented"], STREAM), run(tiny_lm, MATRIX["segmented"], STREAM, (121,))
    torch.testing.assert_close(plain.logits_TV[:121], marked.logits_TV[:121], **EXACT)
    assert plain.state.retrieved_CR.tolist() != marked.state.retrieved_CR.tolist()
    assert plain.state.filled == marked.state.filled
    deaf = run(tiny_lm, tiny_segment(turn_marks=False), STREAM, (121,))
    torch.testing.assert_close(plain.logits_TV, deaf.logits_TV, **EXACT)


def test_what_is_read_again_at_a_mark_sees_what_it_chose(tiny_lm):
    """Two segments are closed; the question is the open one's last six tokens."""
    ours = run(tiny_lm, tiny_segment(reread_tokens=6), STREAM[:42])
    runner = Runner(tiny_lm, tiny_segment(reread_tokens=6))
    state, past = runner.begin(), PastKVManager(CacheConfig()).open_stream(runner.policy.layout)
    for first in (0, 16, 32):
        runner.advance(STREAM[first : min(first + 16, 42)], state, past)
    assert torch.equal(state.retrieved_CR, ours.state.retrieved_CR)
    runner.mark(state, past)
    chosen = state.retrieved_CR
    # The same with the choice before the question.
    plain = Runner(tiny_lm, tiny_segment())
    other, past = plain.begin(), PastKVManager(CacheConfig()).open_stream(plain.policy.layout)
    for first, stop in ((0, 16), (16, 32), (32, 36)):
        plain.advance(STREAM[first:stop], other, past)
    past.decide = lambda choose: chosen
    plain.mark(other, past)
    plain.advance(STREAM[36:42], other, past)
    assert (state.length, state.filled) == (other.length, other.filled) == (42, 10)
    rows = [
        x[:, w.start : w.base + 10]
        for of in (state, other)
        for ws in of.layers
        for w in ws
        for x in (w.k_HND, w.rotated_HND, w.v_HND)
    ]
    for mine, theirs in zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
    first_reading = [w.v_HND[:, w.base + 4 : w.base + 10] for ws in ours.state.layers for w in ws]
    again = [w.v_HND[:, w.base + 4 : w.base + 10] for ws in state.layers for w in ws]
    assert not torch.equal(first_reading[-1], again[-1])


@pytest.mark.parametrize("policy", [name for name, config in MATRIX.items() if isinstance(config, SegmentedConfig)])
@pytest.mark.parametrize("length", [8, 16, 21, 48, 133])
def test_a_prefix_holds_what_the_design_says(tiny_lm, policy, length):
    """Layer 0's unrotated keys depend on their token alone, so they tell which tokens a window holds."""
    config = MATRIX[policy]
    keys_HTD = run(tiny_lm, MATRIX["full"], STREAM[:length]).state.layers[0][0].k_HND
    state = run(tiny_lm, config, STREAM[:length]).state
    closed = length - length % config.segment_tokens
    readers = {Cell(0, 0), Cell(0, 1)} if config.readers is None else set(config.readers)
    for window in state.layers[0]:
        cell = Cell(0, window.heads[0])
        reads = bool(config.retrieved_tokens) and cell in readers
        sinks = list(range(min(config.sink_tokens, closed)))
        longest = config.reader_tail_tokens if reads else config.tail_tokens
        tail = list(range(max(len(sinks), closed - longest), closed))
        expected = sinks + (state.retrieved_CR[0].tolist() if reads else []) + tail
        if cell in config.segment_only:
            expected = []
        assert expected == sorted(set(expected))
        assert window.base - window.start == len(expected)
        got = window.k_HND[:, window.start : window.base]
        torch.testing.assert_close(got, keys_HTD[list(window.heads)][:, expected], **EXACT)
