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


def learnt(device: str, dtype: torch.dtype, config, **options) -> tuple[float, torch.Tensor]:
    """The loss of a stream of seven segments with two marks, and all gradients in a row."""
    lm = CausalLM(tiny_model(dtype=dtype).to(device))
    lm.model.requires_grad_(True)
    trainer = SegmentedTrainer(lm, config, attention="sdpa", **options)
    stream = TrainingStream("s", STREAM[:105], marks=(24,))
    loss = trainer.loss_and_grad(stream, stream.valid_tokens)
    return loss.total, torch.cat([p.grad.flatten().cpu().double() for p in trainer.parameters])


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("checkpoint_layers", [False, True])
@pytest.mark.parametrize("k", [0, 1, "all"])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_those_of_the_host(policy, k, checkpoint_layers, record):
    options = {"k": k, "checkpoint_layers": checkpoint_layers}
    loss, gradient = learnt(DEVICE, torch.float32, POLICIES[policy], record=record, **options)
    exact_loss, exact = learnt("cpu", torch.float64, POLICIES[policy], **options)
    assert loss == pytest.approx(exact_loss, rel=1e-4)
    assert (gradient - exact).norm() < 1e-3 * exact.norm()
