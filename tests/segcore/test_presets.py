"""Settings by name: the published ones, the default ones."""

import dataclasses

import pytest

from segcore.config import Cell, SegmentedConfig
from segcore.errors import ConfigError
from segcore.policies import make_policy
from segcore.presets import DEFAULT_MODEL, LONG_HEADS, paper_preset, segment_preset


def test_the_papers_preset_is_the_published_one(tiny_lm):
    config = paper_preset()
    shape = {"layers": 32, "kv_heads": 32, "queries_per_kv_head": 1, "head_dim": 2, "max_positions": 4608}
    policy = make_policy(config, dataclasses.replace(tiny_lm.spec, **shape), tiny_lm.rope)
    local = tuple(head for head in range(32) if head not in LONG_HEADS)
    assert (len(LONG_HEADS), config.prefix_tokens, config.segment_tokens) == (16, 512, 4096)
    assert policy.readers == policy.watched
    assert policy.readers == tuple(Cell(layer, head) for layer in (6, 8, 11, 16) for head in LONG_HEADS)
    for layer in range(32):
        long_window, local_window = sorted(policy.windows(layer), key=lambda window: window.heads)
        assert (long_window.heads, local_window.heads) == (LONG_HEADS, local)
        assert local_window.base == local_window.position == long_window.position == 512
        assert long_window.base == (512 if Cell(layer, LONG_HEADS[0]) in policy.readers else 0)
        assert policy.seen_by_others(Cell(layer, local[0])) == (0, 512)
        if layer not in (6, 8, 11, 16):
            assert {policy.seen_by_others(Cell(layer, head)) for head in LONG_HEADS} == {(0, 0)}


@pytest.mark.parametrize("model", ["meta-llama/Llama-2-7b-hf", "togethercomputer/LLaMA-2-7B-32K"])
def test_the_papers_preset_is_for_its_model(model):
    assert segment_preset(model, "paper") == paper_preset()
    assert segment_preset(model) == SegmentedConfig()


def test_the_default_model_has_what_was_measured_for_it():
    preset = segment_preset(DEFAULT_MODEL)
    assert preset == SegmentedConfig(selectors=(Cell(18, 2),), reread_tokens=64)


def test_presets_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"names heads of Llama-2-7B, not of 'smollm2.*choose preset 'default'"):
        segment_preset(DEFAULT_MODEL, "paper")
    with pytest.raises(ConfigError, match="unknown preset 'best'; known: default, paper"):
        segment_preset(DEFAULT_MODEL, "best")
