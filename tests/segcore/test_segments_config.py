"""Where a stream is cut, and which configurations are refused."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segcore.config import (
    SEGMENT_CONFIGS,
    CacheConfig,
    Cell,
    EngineConfig,
    LagKVConfig,
    SegmentedConfig,
    segment_config,
)
from segcore.errors import ConfigError
from segcore.segments import is_refresh_point, tokens_to_next_cut


@st.composite
def cuttings(draw):
    size = draw(st.integers(1, 200))
    refresh = draw(st.none() | st.integers(1, size - 1)) if size > 1 else None
    segment = SegmentedConfig(segment_tokens=size, sink_tokens=0, refresh_tokens=refresh)
    return segment, draw(st.integers(1, 300)), draw(st.integers(0, size - 1))


def literal_cuts(segment: SegmentedConfig, chunk_tokens: int) -> list[int]:
    """The counts of an open segment at which a forward pass ends."""
    steps = [chunk_tokens] + ([segment.refresh_tokens] if segment.refresh_tokens else [])
    size = segment.segment_tokens
    return [n for n in range(1, size + 1) if n == size or any(n % step == 0 for step in steps)]


@settings(deadline=None)
@given(cuttings())
def test_next_cut_is_the_nearest_multiple_or_the_end(case):
    segment, chunk_tokens, filled = case
    want = min(n for n in literal_cuts(segment, chunk_tokens) if n > filled)
    assert filled + tokens_to_next_cut(filled, segment, chunk_tokens) == want


@settings(deadline=None)
@given(cuttings(), st.lists(st.integers(1, 50), min_size=1))
def test_cuts_do_not_depend_on_how_tokens_arrive(case, arrivals):
    """However few tokens a pass gets, passes end at every cut and none crosses one."""
    segment, chunk_tokens, _ = case
    filled, reached, turn = 0, [], 0
    while filled < segment.segment_tokens:
        left = tokens_to_next_cut(filled, segment, chunk_tokens)
        taken = min(left, arrivals[turn % len(arrivals)])
        filled, turn = filled + taken, turn + 1
        if taken == left:
            reached.append(filled)
    assert reached == literal_cuts(segment, chunk_tokens)


@pytest.mark.parametrize("filled", [-1, 8, 9])
def test_a_full_segment_has_no_next_cut(filled):
    with pytest.raises(AssertionError):
        tokens_to_next_cut(filled, SegmentedConfig(segment_tokens=8), 4)


@settings(deadline=None)
@given(cuttings())
def test_refresh_points_are_inner_multiples(case):
    segment, chunk_tokens, filled = case
    want = filled > 0 and segment.refresh_tokens is not None and filled % segment.refresh_tokens == 0
    assert is_refresh_point(filled, segment) == want
    if want:
        assert filled in literal_cuts(segment, chunk_tokens)


@pytest.mark.parametrize(
    ("sinks", "tail", "reader_tail", "retrieved", "prefix"),
    [(4, 512, 256, 512, 772), (4, 512, 0, 512, 516), (0, 800, 256, 512, 800), (4, 0, 0, 0, 4), (0, 0, 0, 0, 0)],
)
def test_prefix_is_the_sinks_and_the_larger_of_tail_and_retrieved(sinks, tail, reader_tail, retrieved, prefix):
    config = SegmentedConfig(
        sink_tokens=sinks, tail_tokens=tail, reader_tail_tokens=reader_tail, retrieved_tokens=retrieved
    )
    assert config.prefix_tokens == prefix


def test_cells_may_be_plain_pairs():
    config = SegmentedConfig(selectors=[(1, 0)], readers=((0, 1), (2, 1)))
    assert config.selectors == (Cell(1, 0),)
    assert config.readers == (Cell(0, 1), Cell(2, 1))
    assert config.readers[1].layer == 2
    assert SegmentedConfig().readers is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("segment_tokens", 0),
        ("segment_tokens", 3),  # fewer than the sinks
        ("segment_tokens", 64.0),
        ("block_tokens", 0),
        ("query_window_tokens", 0),
        ("sink_tokens", -1),
        ("tail_tokens", -1),
        ("reader_tail_tokens", -1),
        ("retrieved_tokens", -16),
        ("retrieved_tokens", 40),  # not whole blocks
        ("retrieved_tokens", "32"),
        ("refresh_tokens", 0),
        ("refresh_tokens", 64),
        ("refresh_tokens", -1),
    ],
)
def test_segment_config_refuses(name, value):
    good = {"segment_tokens": 64, "retrieved_tokens": 32, "block_tokens": 16, "sink_tokens": 4}
    SegmentedConfig(**good)
    with pytest.raises(ConfigError, match=f"^(sink_tokens=4|{name}={value!r}) must"):
        SegmentedConfig(**{**good, name: value})


@pytest.mark.parametrize("refresh", [1, 63, None])
def test_refresh_may_be_anything_inside_the_segment(refresh):
    assert SegmentedConfig(segment_tokens=64, refresh_tokens=refresh).refresh_tokens == refresh


def test_sinks_may_fill_the_first_segment():
    assert SegmentedConfig(segment_tokens=4, sink_tokens=4).sink_tokens == 4


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (CacheConfig, "host_bytes", -1),
        (CacheConfig, "host_bytes", None),
        (CacheConfig, "disk_bytes", -1),
        (CacheConfig, "disk_bytes", 0.5),
        (EngineConfig, "chunk_tokens", 0),
        (EngineConfig, "max_sessions", 0),
        (EngineConfig, "max_session_tokens", 0),
        (EngineConfig, "max_pending_tokens", 0),
    ],
)
def test_engine_and_cache_configs_refuse(kind, name, value):
    with pytest.raises(ConfigError, match=f"{name}={value!r} must be a whole number"):
        kind(**{name: value})


@pytest.mark.parametrize("kind", [SegmentedConfig, CacheConfig, EngineConfig])
def test_unknown_fields_are_refused_and_configs_are_frozen(kind):
    with pytest.raises(TypeError):
        kind(no_such_field=1)
    config = kind()
    with pytest.raises(AttributeError):
        config.policy = "full"


def test_zero_budgets_are_allowed():
    config = CacheConfig(host_bytes=0, disk_bytes=0, directory=Path("unused"))
    assert (config.host_bytes, config.disk_bytes) == (0, 0)


def test_policies_are_configured_by_name():
    assert segment_config("lagkv", lag_tokens=128) == LagKVConfig(lag_tokens=128)
    assert {segment_config(policy).policy for policy in SEGMENT_CONFIGS} == set(SEGMENT_CONFIGS)
    with pytest.raises(ConfigError, match="unknown policy 'psychic'; known: duo, full,"):
        segment_config("psychic")
    with pytest.raises(ConfigError, match="policy 'full' has no option sink_tokens; it has segment_tokens"):
        segment_config("full", sink_tokens=4)
