"""Packed weights: the same values, bit for bit, and the same state_dict."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from segcore import packed
from segcore.fingerprint import weights_digest
from segcore.model import CausalLM
from segcore.packed import PackedLinear, is_for_inference, pack_linears
from tests.conftest import FAMILIES, VOCABULARY, tiny_model

packs = pytest.mark.skipif(not packed.supported(torch.bfloat16), reason="this CPU has no instructions for bf16")


def logits(lm: CausalLM, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return lm(tokens, lambda layer, q, k, v, scale: q, all_logits=True)


@packs
@pytest.mark.parametrize("family", FAMILIES)
def test_packing_changes_no_bit(family):
    lm = CausalLM(tiny_model(family, dtype=torch.bfloat16))
    tokens = torch.arange(37) % VOCABULARY
    before, digest = logits(lm, tokens), weights_digest(lm.model)
    pack_linears(lm.model)
    assert any(isinstance(module, PackedLinear) for module in lm.model.modules())
    assert torch.equal(logits(lm, tokens), before)
    assert weights_digest(lm.model) == digest
    assert all(type(module) is not nn.Linear or module is lm.model.lm_head for module in lm.model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cpu_without_the_instructions_runs_the_weights_as_they_are(family, monkeypatch):
    monkeypatch.setattr(packed, "supported", lambda dtype: False)
    lm = CausalLM(tiny_model(family, dtype=torch.bfloat16))
    tokens = torch.arange(37) % VOCABULARY
    before = logits(lm, tokens)
    pack_linears(lm.model)
    assert not any(isinstance(module, PackedLinear) for module in lm.model.modules())
    assert is_for_inference(lm.model)
    assert torch.equal(logits(lm, tokens), before)


@packs
def test_a_head_that_shares_the_embedding_stays_as_it_is():
    model = tiny_model(dtype=torch.bfloat16)
    model.lm_head.weight = model.model.embed_tokens.weight
    pack_linears(model)
    assert type(model.lm_head) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)


def test_wide_weights_are_left_alone():
    model = tiny_model(dtype=torch.float32)
    pack_linears(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
