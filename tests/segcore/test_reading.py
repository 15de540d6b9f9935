"""Likelihoods of a text: those of training's forward pass, and of the model's own code."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from segcore import reading
from segcore.config import segment_config
from segcore.errors import LimitExceeded
from segcore.model import CausalLM
from segcore.reading import read, token_losses
from segcore.training.stream import TrainingStream
from segcore.training.tbptt import SegmentedTrainer
from tests.conftest import VOCABULARY, tiny_model, tiny_segment

TOKENS = torch.randint(2, VOCABULARY, (150,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    made = CausalLM(tiny_model())
    made.model.requires_grad_(True)
    return made


POLICIES = {
    "segmented": tiny_segment(),
    "streaming": segment_config("streaming", segment_tokens=16, sink_tokens=2, window_tokens=20),
    "lagkv": segment_config("lagkv", segment_tokens=16, sink_tokens=2, lag_tokens=8, keep=0.5),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("chunk", [7, 1024])
def test_the_loss_of_a_stream_is_the_one_that_training_has(lm, name, chunk):
    trained = SegmentedTrainer(lm, POLICIES[name], k=0).loss_and_grad(TrainingStream("x", TOKENS), len(TOKENS))
    losses = token_losses(lm, POLICIES[name], TOKENS, chunk_tokens=chunk)
    assert losses.shape == (len(TOKENS) - 1,)
    assert losses.sum().item() == pytest.approx(trained.total, rel=1e-10)


def test_full_attention_is_the_models_own(lm, monkeypatch):
    monkeypatch.setattr(reading, "LOGITS", 7 * VOCABULARY)
    own = tiny_model()(TOKENS[None]).logits[0, :-1]
    losses = token_losses(lm, segment_config("full", segment_tokens=32), TOKENS)
    torch.testing.assert_close(losses, cross_entropy(own, TOKENS[1:], reduction="none").detach(), rtol=1e-5, atol=1e-5)


def test_a_text_beyond_the_positions_is_refused(lm):
    with pytest.raises(LimitExceeded, match="512 at most"):
        token_losses(lm, segment_config("full"), TOKENS.repeat(4))


def test_a_part_is_read_as_in_the_whole(lm):
    whole = read(lm, POLICIES["segmented"], TOKENS)
    for first in (2, 40, 149, 150):
        part = read(lm, POLICIES["segmented"], TOKENS, first=first)
        torch.testing.assert_close(part.losses_T, whole.losses_T[first - 1 :], rtol=1e-12, atol=1e-12)
        assert torch.equal(part.greedy_T, whole.greedy_T[first - 1 :])


def test_a_mark_is_read_as_training_has_it(lm):
    stream = TrainingStream("x", TOKENS, marks=(100,))
    trained = SegmentedTrainer(lm, POLICIES["segmented"], k=0).loss_and_grad(stream, len(TOKENS))
    marked = read(lm, POLICIES["segmented"], TOKENS, mark=100)
    assert marked.losses_T.sum().item() == pytest.approx(trained.total, rel=1e-10)
    plain = token_losses(lm, POLICIES["segmented"], TOKENS)
    assert torch.equal(marked.losses_T[:99], plain[:99])
    assert not torch.equal(marked.losses_T, plain)


def test_the_likeliest_tokens_are_known(lm):
    said = tiny_model().generate(TOKENS[None, :40], max_new_tokens=6, do_sample=False, eos_token_id=-1)[0]
    found = read(lm, segment_config("full", segment_tokens=32), said, first=40)
    assert found.greedy_T.tolist() == [True] * 6
    other = said.clone()
    other[43] = (said[43] + 1) % VOCABULARY
    assert read(lm, segment_config("full", segment_tokens=32), other, first=40).greedy_T[:4].tolist() == [True] * 3 + [
        False
    ]
