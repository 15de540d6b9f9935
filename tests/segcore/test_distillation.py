"""Self-distillation: the distance from the model's own predictions, of which the adapter has no part."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft.tuners.lora import LoraLayer

from segcore.config import FullConfig
from segcore.errors import InvalidInput
from segcore.model import CausalLM
from segcore.training import distillation
from segcore.training.lora import add_lora
from segcore.training.stream import IGNORED, TrainingStream
from segcore.training.tbptt import SegmentedTrainer
from tests.conftest import tiny_model, tiny_segment
from tests.segcore.test_invariants import STREAM

LABELS = torch.where((torch.arange(90) > 40) & (torch.arange(90) < 80), STREAM[:90], IGNORED)
DISTILLED = TrainingStream("a text", STREAM[:90], LABELS, marks=(53,), distilled=True)
PLAIN = TrainingStream("a text", STREAM[:90], LABELS, marks=(53,))


@pytest.fixture
def lm():
    """With an adapter that changes everything."""
    lm = CausalLM(tiny_model())
    add_lora(lm)
    generator = torch.Generator().manual_seed(5)
    for parameter in lm.model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return lm


def gradients(lm, trainer, stream):
    loss = trainer.loss_and_grad(stream, 100).total
    found = torch.cat([p.grad.flatten() for p in trainer.parameters])
    lm.model.zero_grad()
    return loss, found


@pytest.fixture
def said(lm, monkeypatch):
    """What the model says by full attention with its adapter, [T, V]."""
    with monkeypatch.context() as patched:
        patched.setattr(distillation, "without_adapter", lambda model: nullcontext())
        return lm.head(distillation.own_hidden(lm, DISTILLED)[None])[0].detach()


def test_the_model_itself_has_no_adapter_and_sees_everything(lm, said):
    with torch.inference_mode():
        expected = tiny_model()(STREAM[None, :90]).logits[0]
        ours = lm.head(distillation.own_hidden(lm, DISTILLED)[None])[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)  # transformers has angles in fp32
    assert (said - expected).abs().max() > 0.1
    scales = {scale for layer in lm.model.modules() if isinstance(layer, LoraLayer) for scale in layer.scaling.values()}
    assert scales == {2.0}  # it is back


@pytest.mark.parametrize("config", [tiny_segment(segment_tokens=128), FullConfig(segment_tokens=16)])
def test_the_loss_is_the_divergence_at_targets(lm, said, config):
    trainer = SegmentedTrainer(lm, config, k="all")  # full attention, in one segment or in six
    loss, _ = gradients(lm, trainer, DISTILLED)
    with torch.inference_mode():
        own = tiny_model()(STREAM[None, :90]).logits[0].log_softmax(-1)
    targets = DISTILLED.targets_T != IGNORED
    expected = (own.exp() * (own - said.log_softmax(-1)))[targets].sum()
    assert loss == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("k", [0, 1, "all"])
def test_gradients_lead_to_the_model_itself(lm, k):
    # Nothing is retrieved, which carries no gradient.
    trainer = SegmentedTrainer(lm, tiny_segment(retrieved_tokens=0, selectors=()), k=k)
    loss, gradient = gradients(lm, trainer, DISTILLED)
    assert not torch.allclose(gradient, gradients(lm, trainer, PLAIN)[1])
    # A small step against the gradient lowers the loss by as much as that says.
    step, at = 1e-6, 0
    for parameter in trainer.parameters:
        part = gradient[at : at + parameter.numel()].view_as(parameter)
        parameter.data -= step * part
        at += parameter.numel()
    after, _ = gradients(lm, trainer, DISTILLED)
    if k == "all":  # others are truncated
        assert (loss - after) / 100 == pytest.approx(step * gradient.square().sum().item(), rel=1e-2)
    else:
        assert after < loss


def test_an_adapter_that_changes_nothing_is_at_its_aim():
    lm = CausalLM(tiny_model())
    add_lora(lm)  # its product is zero at first
    trainer = SegmentedTrainer(lm, tiny_segment(segment_tokens=128))
    loss, gradient = gradients(lm, trainer, DISTILLED)
    assert loss == pytest.approx(0, abs=1e-6)  # of other positions: angles are in fp32
    assert gradient.abs().max() < 1e-6


def test_what_is_longer_than_the_model_sees_is_refused(lm):
    stream = TrainingStream("long", STREAM.repeat(20), distilled=True)
    with pytest.raises(InvalidInput, match="itself sees"):
        SegmentedTrainer(lm, tiny_segment()).loss_and_grad(stream, len(stream.tokens_T))
