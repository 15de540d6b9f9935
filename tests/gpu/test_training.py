"""Training on the device: losses and gradients are those of the host, whatever reaches back, layers kept or not."""

from __future__ import annotations

import pytest
import torch

from segcore.config import StreamingConfig
from segcore.model import CausalLM
from segcore.training.stream import TrainingStream
from segcore.training.tbptt import SegmentedTrainer
from tests.conftest import tiny_model, tiny_segment
from tests.segcore.test_invariants import STREAM

DEVICE = "cuda"
POLICIES = {
    "segmented": tiny_segment(),
    "streaming": StreamingConfig(segment_tokens=16, sink_tokens=2, window_tokens=8),
}


# A stream of seven segments: with a mark, and as a conversation, whose passes are short.
MARKS = {"document": (24,), "chat": (5, 20, 24, 29, 39, 50, 52, 60, 70, 77, 84, 90, 95, 100)}


def learnt(device: str, dtype: torch.dtype, config, marks, *, beside=False, **options) -> tuple[float, torch.Tensor]:
    """Its loss, and all gradients in a row. beside: a graph over the same parameters lives meanwhile."""
    lm = CausalLM(tiny_model(dtype=dtype).to(device))
    lm.model.requires_grad_(True)
    alive = lm.model(STREAM[None, :8].to(device)).logits if beside else None
    trainer = SegmentedTrainer(lm, config, attention="sdpa", **options)
    stream = TrainingStream("s", STREAM[:105], marks=marks)
    loss = trainer.loss_and_grad(stream, stream.valid_tokens)
    del alive
    return loss.total, torch.cat([p.grad.flatten().cpu().double() for p in trainer.parameters])


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("checkpoint_layers", [False, True])
@pytest.mark.parametrize("k", [0, 1, "all"])
@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_those_of_the_host(policy, marks, k, checkpoint_layers, record):
    options = {"k": k, "checkpoint_layers": checkpoint_layers, "marks": MARKS[marks]}
    loss, gradient = learnt(DEVICE, torch.float32, POLICIES[policy], record=record, **options)
    exact_loss, exact = learnt("cpu", torch.float64, POLICIES[policy], **options)
    assert loss == pytest.approx(exact_loss, rel=1e-4)
    assert (gradient - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("marks", MARKS)
def test_passes_are_recorded_while_another_graph_lives(marks, k):
    options = {"k": k, "marks": MARKS[marks]}
    loss, gradient = learnt(DEVICE, torch.float32, POLICIES["segmented"], record=True, beside=True, **options)
    exact_loss, exact = learnt("cpu", torch.float64, POLICIES["segmented"], **options)
    assert loss == pytest.approx(exact_loss, rel=1e-4)
    assert (gradient - exact).norm() < 1e-3 * exact.norm()
