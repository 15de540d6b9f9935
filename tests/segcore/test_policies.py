"""Each policy against an independent, literal reading of its method, and which configurations are refused.

Shapes: T tokens of a stream, N keys of a query, L tokens of a lag, H KV heads, G query heads per KV head, D head
dimension.
"""

import dataclasses
import functools
import math

import pytest
import torch

from segcore.config import Cell, DuoConfig, FullConfig, LagKVConfig, LongGenConfig, StreamingConfig, segment_config
from segcore.errors import ConfigError
from segcore.policies import POLICIES, make_policy
from tests.conftest import tiny_segment
from tests.segcore import literal
from tests.segcore.test_invariants import EXACT, STREAM, run

pytestmark = pytest.mark.usefixtures("no_gradients")

# The reference: one pass over the whole stream, whose attention gathers, for each cell, the tokens that a rule lists.


def one_pass(lm, config, stream_T, rule, *, marks=(), position=None):
    """Logits of a stream. rule(layer, head, start, at, q_GTD, k_TD, v_TD): the stream positions that the queries from
    `at` on, in the segment that begins at `start`, see before it. position: RoPE position of a segment's first token,
    its prefix being contiguous before it; None: every token has its own."""
    size, length = config.segment_tokens, len(stream_T)
    cuts = sorted({*range(0, length, size), *(m for m in marks if m < length)})

    def attend(layer, q_HGTD, k_HTD, v_HTD, scale):
        out_HGTD = torch.empty_like(q_HGTD)
        for head in range(k_HTD.shape[0]):
            q_GTD, k_TD, v_TD = q_HGTD[head], k_HTD[head], v_HTD[head]
            for at, stop in zip(cuts, [*cuts[1:], length], strict=True):
                start = at - at % size
                prefix = rule(layer, head, start, at, q_GTD, k_TD, v_TD)
                rows = [*prefix, *range(start, stop)]
                assert prefix == sorted({j for j in prefix if 0 <= j < start})
                if position is None:
                    q = lm.rope(q_GTD, k_HTD, 0)[0][:, at:stop]
                    k_ND = lm.rope.keys(k_TD[None], 0)[0, rows]
                else:
                    q = lm.rope(q_GTD[:, at:stop], k_TD[None, at:stop], position + at - start)[0]
                    k_ND = lm.rope.keys(k_TD[None, rows], position - len(prefix))[0]
                seen_TN = torch.tensor(rows) <= torch.arange(at, stop)[:, None]
                scores_GTN = (q @ k_ND.T * scale).masked_fill(~seen_TN, -math.inf)
                out_HGTD[head, :, at:stop] = scores_GTN.softmax(dim=-1) @ v_TD[rows]
        return out_HGTD

    return lm(stream_T, attend, all_logits=True)


def rule_of_full(config, lm):
    return lambda layer, head, start, at, q, k, v: list(range(start))


def rule_of_streaming(config, lm):
    def rule(layer, head, start, at, q, k, v):
        return [j for j in range(start) if j < config.sink_tokens or j >= start - config.window_tokens]

    return rule


def rule_of_longgen(config, lm):
    def rule(layer, head, start, at, q, k, v):
        def old(j):
            if config.stride_blocks is None:
                return j < config.sink_tokens
            return (j // config.block_tokens) % config.stride_blocks == 0

        return [j for j in range(start) if layer in config.full_layers or old(j) or j >= start - config.window_tokens]

    return rule


def rule_of_duo(config, lm):
    def rule(layer, head, start, at, q, k, v):
        if (layer, head) in config.retrieval:
            return list(range(start))
        return [j for j in range(start) if j < config.sink_tokens or j >= start - config.window_tokens]

    return rule


def rule_of_lagkv(config, lm):
    sinks, size = config.sink_tokens, config.lag_tokens

    def rule(layer, head, start, at, q, k, v):
        rotated = lm.rope.keys(k[None], 0)[0].tolist()
        seen, first = list(range(min(sinks, start))), sinks
        while first + 2 * size <= start:
            lag, following = slice(first, first + size), slice(first + size, first + 2 * size)
            values = v.tolist()
            kept = literal.kept_of_lag(rotated[lag], values[lag], rotated[following], values[following], config.keep)
            seen += [first + i for i in kept]
            first += size
        return seen + list(range(first, start))

    return rule


def rule_of_segmented(config, lm, choices=None):
    """Selection "cell". choices: filled with what each reader chose, by (cell, where)."""

    def rule(layer, head, start, at, q, k, v):
        cell = (layer, head)
        if cell in config.segment_only:
            return []
        sinks = list(range(min(config.sink_tokens, start)))
        longest = config.reader_tail_tokens if cell in config.readers else config.tail_tokens
        tail = list(range(max(len(sinks), start - longest), start))
        if cell not in config.readers or start == 0:
            return sinks + tail
        chosen = literal.anchors(
            [window[max(0, at - config.query_window_tokens) : at] for window in q.tolist()],
            k.tolist(),
            first=len(sinks),
            stop=start - len(tail),
            tokens=config.retrieved_tokens,
        )
        if choices is not None:
            choices[cell, at] = chosen
        return sinks + chosen + tail

    return rule


RULES = {
    "full": rule_of_full,
    "streaming": rule_of_streaming,
    "longgen": rule_of_longgen,
    "duo": rule_of_duo,
    "lagkv": rule_of_lagkv,
    "segmented": rule_of_segmented,
}


def paper_like(**changes):
    """The published operator at the size of the tiny model; its own readers, no sinks, no tail for readers."""
    options = {
        "segment_tokens": 20,
        "selection": "cell",
        "selectors": (),
        "sink_tokens": 0,
        "tail_tokens": 6,
        "reader_tail_tokens": 0,
        "retrieved_tokens": 24,
        "query_window_tokens": 18,
        "readers": (Cell(0, 1), Cell(1, 0)),
        "segment_only": (Cell(1, 1),),
    }
    return tiny_segment(**(options | changes))


CASES = {
    "full": FullConfig(segment_tokens=16),
    "streaming": StreamingConfig(segment_tokens=16, sink_tokens=3, window_tokens=10),
    "streaming-long-window": StreamingConfig(segment_tokens=12, sink_tokens=0, window_tokens=31),
    "streaming-sinks-alone": StreamingConfig(segment_tokens=16, sink_tokens=5, window_tokens=0),
    "longgen": LongGenConfig(segment_tokens=16, full_layers=(0,), sink_tokens=3, window_tokens=10),
    "longgen-long-window": LongGenConfig(segment_tokens=12, full_layers=(1,), sink_tokens=7, window_tokens=31),
    "longgen-sparse": LongGenConfig(segment_tokens=16, full_layers=(), sink_tokens=0, window_tokens=5),
    "longgen-dense": LongGenConfig(segment_tokens=16, full_layers=(0, 1), sink_tokens=0, window_tokens=5),
    "longgen-strided": LongGenConfig(
        segment_tokens=16, full_layers=(1,), sink_tokens=0, window_tokens=10, stride_blocks=3, block_tokens=7
    ),
    "longgen-strided-no-window": LongGenConfig(
        segment_tokens=12, full_layers=(), sink_tokens=9, window_tokens=0, stride_blocks=2, block_tokens=20
    ),
    "longgen-stride-1": LongGenConfig(
        segment_tokens=16, full_layers=(), sink_tokens=0, window_tokens=3, stride_blocks=1, block_tokens=4
    ),
    "duo": DuoConfig(segment_tokens=16, retrieval=(Cell(0, 1), Cell(1, 0)), sink_tokens=3, window_tokens=10),
    "duo-one-head": DuoConfig(segment_tokens=12, retrieval=(Cell(1, 1),), sink_tokens=0, window_tokens=31),
    "lagkv-two-lags-a-segment": LagKVConfig(segment_tokens=16, sink_tokens=3, lag_tokens=8, keep=0.5),
    "lagkv-uneven": LagKVConfig(segment_tokens=16, sink_tokens=2, lag_tokens=5, keep=0.41),
    "lagkv-long-lags": LagKVConfig(segment_tokens=16, sink_tokens=20, lag_tokens=24, keep=0.25),
    "lagkv-keeps-nothing": LagKVConfig(segment_tokens=16, sink_tokens=0, lag_tokens=6, keep=0.1),
    "lagkv-keeps-everything": LagKVConfig(segment_tokens=16, sink_tokens=1, lag_tokens=6, keep=1.0),
    "paper": paper_like(),
    "paper-with-sinks-and-tail": paper_like(sink_tokens=3, reader_tail_tokens=5, segment_only=()),
}
MARKS = (21, 37, 60, 101)


@functools.cache
def logits_of_rule(lm, name):
    config = CASES[name]
    position = None if POLICIES[config.policy].original_positions else config.prefix_tokens
    return one_pass(lm, config, STREAM, RULES[config.policy](config, lm), marks=MARKS, position=position)


@pytest.mark.parametrize("name", CASES)
def test_a_stream_equals_one_pass_that_sees_what_the_method_says(tiny_lm, name):
    ours = run(tiny_lm, CASES[name], STREAM, MARKS)
    torch.testing.assert_close(ours.logits_TV, logits_of_rule(tiny_lm, name), **EXACT)


def test_the_methods_differ(tiny_lm):
    """What each rule sees shows in the logits: else equality would prove nothing."""
    last = {name: logits_of_rule(tiny_lm, name)[-1] for name in CASES}
    same_as_full = {"longgen-dense", "longgen-stride-1", "lagkv-keeps-everything"}
    names = [name for name in CASES if name not in same_as_full]
    for i, name in enumerate(names):
        for other in names[:i]:
            assert (last[name] - last[other]).abs().max() > 1e-3, (name, other)
    for name in same_as_full:
        torch.testing.assert_close(last[name], last["full"], **EXACT)


@functools.cache
def full_state(lm, length):
    return run(lm, CASES["full"], STREAM[:length]).state


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [5, 16, 33, 48, 133])
def test_a_window_holds_each_token_once_at_its_position(tiny_lm, name, length):
    """Layer 0's unrotated keys and values depend on their token alone, so they tell which tokens a window holds."""
    config = CASES[name]
    (all_tokens,) = full_state(tiny_lm, length).layers[0]
    k_HTD, v_HTD, rotated_HTD = all_tokens.k_HND, all_tokens.v_HND, all_tokens.rotated_HND
    rule, start = RULES[config.policy](config, tiny_lm), length - length % config.segment_tokens
    ours = run(tiny_lm, config, STREAM[:length])
    for window in ours.state.layers[0]:
        live = slice(window.start, window.base + length - start)
        for i, head in enumerate(window.heads):
            if config.policy == "segmented" and Cell(0, head) in config.readers and start:
                continue  # its choice asks the queries; the choices have a test of their own
            prefix = rule(0, head, start, start, None, k_HTD[head], v_HTD[head])
            rows = [*prefix, *range(start, length)]
            assert live.stop - live.start == len(rows)
            torch.testing.assert_close(window.k_HND[i, live], k_HTD[head, rows], **EXACT)
            torch.testing.assert_close(window.v_HND[i, live], v_HTD[head, rows], **EXACT)
            if POLICIES[config.policy].original_positions:
                assert window.position == start
                expected = rotated_HTD[head, rows]
            else:
                assert window.position == config.prefix_tokens
                expected = tiny_lm.rope.keys(k_HTD[None, head, rows], config.prefix_tokens - len(prefix))[0]
            torch.testing.assert_close(window.rotated_HND[i, live], expected, **EXACT)


@pytest.mark.parametrize("name", ["paper", "paper-with-sinks-and-tail"])
@pytest.mark.parametrize("length", [19, 20, 60, 75, 133])
def test_each_reader_retrieves_what_the_literal_steps_choose(tiny_lm, name, length):
    config, chosen = CASES[name], {}
    ours = run(tiny_lm, config, STREAM[:length], MARKS).state.retrieved_CR.tolist()
    # A token after the stream's end shows what a refresh point there chose.
    longer = STREAM[: length + 1]
    rule = rule_of_segmented(config, tiny_lm, chosen)
    one_pass(tiny_lm, config, longer, rule, marks=MARKS, position=config.prefix_tokens)
    closed = length - length % config.segment_tokens
    latest = max([closed, *(m for m in MARKS if m < length)])
    assert ours == ([chosen[cell, latest] for cell in config.readers] if closed else [[]])


# What policies promise of themselves, and which configurations are refused.


def policy_of(lm, config, **shape):
    return make_policy(config, dataclasses.replace(lm.spec, **shape), lm.rope)


def test_a_stream_at_original_positions_is_as_long_as_the_models_positions(tiny_lm):
    limits = {name: policy_of(tiny_lm, config).max_stream_tokens for name, config in CASES.items()}
    unlimited = {name for name, limit in limits.items() if limit is None}
    assert unlimited == {name for name in CASES if name.startswith(("streaming", "paper"))}
    assert {limits[name] for name in CASES if name not in unlimited} == {512}


def test_what_grows_says_so(tiny_lm):
    """Bytes after a longer stream are more if and only if the policy isn't bounded (I10 tests the other direction)."""
    for name in ("full", "longgen", "longgen-strided-no-window", "duo", "lagkv-uneven"):
        short, long = (run(tiny_lm, CASES[name], STREAM.repeat(n)).state.nbytes for n in (1, 3))
        assert long > short
        assert not POLICIES[CASES[name].policy].bounded


@pytest.mark.parametrize(("layers", "middle"), [(32, range(10, 22)), (30, range(10, 20)), (3, [1]), (2, [0, 1])])
def test_longgens_full_layers_are_the_middle_third(tiny_lm, layers, middle):
    policy = policy_of(tiny_lm, LongGenConfig(segment_tokens=64), layers=layers)
    # A layer that sees everything has no room set aside for a window.
    assert [layer for layer in range(layers) if policy.windows(layer)[0].base == 0] == list(middle)


REFUSED = {
    "longgen-layer": (LongGenConfig(segment_tokens=64, full_layers=(1, 2)), r"full_layers \[2\] aren't in"),
    "longgen-negative": (LongGenConfig(segment_tokens=64, full_layers=(-1,)), r"full_layers \[-1\] .* are 0 to 1"),
    "duo-none": (DuoConfig(segment_tokens=64), r"set retrieval to \(layer, KV head\) pairs \(`segcore heads`"),
    "duo-layer": (DuoConfig(segment_tokens=64, retrieval=(Cell(2, 0),)), r"cell \(2, 0\) isn't in the model: 2 layers"),
    "duo-head": (DuoConfig(segment_tokens=64, retrieval=(Cell(0, 2),)), r"cell \(0, 2\) isn't in the model"),
    "streaming-positions": (StreamingConfig(segment_tokens=64, window_tokens=445), "take 513 positions, .* on 512"),
    "paper-positions": (paper_like(segment_tokens=489), "take 513 positions, .* lower segment_tokens"),
    "paper-reader": (paper_like(readers=(Cell(0, 7),)), r"cell \(0, 7\) isn't in the model"),
    "paper-segment-only": (paper_like(segment_only=(Cell(5, 0),)), r"cell \(5, 0\) isn't in the model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_the_model_is_refused(tiny_lm, name):
    config, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        make_policy(config, tiny_lm.spec, tiny_lm.rope)


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("lagkv", {"keep": 1.01}, r"keep=1\.01 must lie between 0 and 1"),
        ("lagkv", {"keep": -0.1}, r"keep=-0\.1 must"),
        ("lagkv", {"lag_tokens": 1}, "lag_tokens=1 must"),
        ("lagkv", {"sink_tokens": -1}, "sink_tokens=-1 must"),
        ("longgen", {"stride_blocks": 0}, "stride_blocks=0 must"),
        ("longgen", {"block_tokens": 0}, "block_tokens=0 must"),
        ("longgen", {"window_tokens": -1}, "window_tokens=-1 must"),
        ("longgen", {"segment_tokens": 8}, r"sink_tokens=64 must fit into the first segment \(8\)"),
        ("duo", {"segment_tokens": 8}, "sink_tokens=64 must fit"),
        ("duo", {"window_tokens": 2.5}, r"window_tokens=2\.5 must be a whole number"),
        ("duo", {"keep": 0.5}, "policy 'duo' has no option keep; it has retrieval"),
        ("nonsense", {}, "unknown policy 'nonsense'; known: duo, full, lagkv"),
    ],
)
def test_what_cannot_work_for_any_model_is_refused(policy, options, message):
    with pytest.raises(ConfigError, match=message):
        segment_config(policy, **options)
