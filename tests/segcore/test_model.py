"""Which models run, and that those that can't be run exactly are refused by name with the reason."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import segcore
from segcore.errors import ConfigError, NotFound, UnsupportedModel
from segcore.model import CausalLM
from segcore.policies import make_policy
from tests.conftest import FAMILIES, VOCABULARY, tiny_model, tiny_segment

TINY = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
SMALL = TINY | {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": None}


def refused() -> dict[str, tuple[transformers.PreTrainedModel, str]]:
    gemma2 = transformers.Gemma2Config(**SMALL, head_dim=8)
    one_kind = transformers.Gemma2Config(**SMALL, head_dim=8, layer_types=["full_attention"] * 2)
    smollm3 = transformers.SmolLM3Config(**SMALL, no_rope_layers=[1, 0])
    bloom = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    mistral = transformers.MistralConfig(**SMALL, sliding_window=16)
    dynamic = LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    return {
        "no RoPE": (GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)), "rotary_emb"),
        "ALiBi": (transformers.BloomForCausalLM(bloom), "ALiBi"),
        "sliding window": (transformers.MistralForCausalLM(mistral), "sliding window of 16"),
        "window layers": (transformers.Gemma2ForCausalLM(gemma2), "sliding_attention"),
        "soft cap": (transformers.Gemma2ForCausalLM(one_kind), "softcap term"),
        "a layer without rotation": (transformers.SmolLM3ForCausalLM(smollm3), "layer 1 doesn't rotate"),
        "changing angles": (LlamaForCausalLM(dynamic), "dynamic"),
    }


@pytest.mark.parametrize("kind", refused())
def test_models_that_cannot_be_run_exactly_are_refused_by_name(kind):
    model, reason = refused()[kind]
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        CausalLM(model)
    assert type(model).__name__.removesuffix("ForCausalLM") in caught.value.message


def test_a_multimodal_model_is_refused():
    model = tiny_model()
    model.config.vision_config = {}
    with pytest.raises(UnsupportedModel, match="multimodal"):
        CausalLM(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shape_is_read_off_the_model(family, dtype):
    spec = CausalLM(tiny_model(family, dtype=dtype)).spec
    assert (spec.layers, spec.kv_heads, spec.queries_per_kv_head, spec.head_dim) == (2, 2, 2, 8)
    assert (spec.vocabulary, spec.dtype) == (VOCABULARY, dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rotating_into_rows_changes_no_bit(family, dtype):
    rope = CausalLM(tiny_model(family, dtype=dtype)).rope
    q, k, v = torch.randn(4, 5, 8).to(dtype), torch.randn(2, 5, 8).to(dtype), torch.randn(2, 5, 8).to(dtype)
    rows = tuple(torch.zeros(2, 9, 8, dtype=dtype)[:, 2:7] for _ in range(3))
    rotated_q, rotated_k = rope(q, k, 11)
    assert torch.equal(rope.into(rows, q, k, v, 11), rotated_q)
    assert all(map(torch.equal, rows, (k, rotated_k, v)))


@pytest.mark.parametrize("factor", ["linear", "yarn", "llama3"])
def test_scaled_rope_keeps_the_models_own_angles(factor):
    """The parity check at load compares with the model's own code: it would refuse other angles."""
    rope = {"rope_type": factor, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    if factor == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    torch.manual_seed(0)
    CausalLM(LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=rope)).double())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selectors": ()}, "needs the selector cells"),
        ({"selectors": ((2, 0),)}, r"cell \(2, 0\) isn't in the model"),
        ({"readers": ((0, 2),)}, r"cell \(0, 2\) isn't in the model"),
        ({"segment_tokens": 500}, "positions"),
    ],
)
def test_configurations_that_do_not_fit_the_model_are_refused(tiny_lm, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_policy(tiny_segment(**changes), tiny_lm.spec, tiny_lm.rope)


def test_a_directory_loads_with_its_tokenizer_and_chat_format(model_directory):
    loaded = segcore.load_model(str(model_directory), dtype="float32", device="cpu")
    assert loaded.lm.spec.architecture == "LlamaForCausalLM"
    assert loaded.tokenizer.tokenizer.decode(loaded.chat.header) == "<|start|>assistant\n"
    assert loaded.end_tokens == {1}


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/directory", "absent.gguf"])
def test_an_unknown_model_is_not_found(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotFound, match="can't be loaded"):
        segcore.load_model(name)


@pytest.mark.parametrize(("option", "value"), [("dtype", "float12"), ("device", "abacus")])
def test_bad_options_are_refused(model_directory, option, value):
    with pytest.raises(ConfigError, match=value):
        segcore.load_model(str(model_directory), **{option: value})
