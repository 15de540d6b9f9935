"""Recorded passes of a trainer: the same gradients as unrecorded ones, in fp64, for every policy.

Recordings are played as CUDA graphs are, on a CPU; CUDA's own are for tests/gpu.
"""

from __future__ import annotations

import pytest
import torch

from segcore.engine.runner import Runner
from segcore.training import parts, passes
from segcore.training.stream import TrainingStream
from segcore.training.tbptt import SegmentedTrainer
from tests.segcore.played import play_recordings
from tests.segcore.test_invariants import MATRIX, STREAM
from tests.segcore.unrolled import assert_same_gradients, gradients_of, trained_model

# Four segments of 16, of which one has a mark inside, and a rest.
TEXT = TrainingStream("text", STREAM[:74], marks=(21, 48))
# A conversation: its turns are short, and segments are cut at several places.
CHAT = TrainingStream("chat", STREAM[:74], marks=(3, 18, 21, 25, 30, 48, 66, 67, 70))
# Their passes never run over a whole segment, keep queries from before it, or have prefixes that are seldom full.
NEVER = ("segmented-refreshing", "ltri", "ltri-small-windows")

# Prefixes of these outgrow any room.
GROWING = ("full", "longgen", "duo", "lagkv")


@pytest.fixture(scope="module")
def lm():
    return trained_model()


@pytest.fixture(autouse=True)
def _played(monkeypatch):
    play_recordings(monkeypatch)


def gradients(lm, trainer, *, stream=TEXT, times=1):
    losses = [trainer.loss_and_grad(stream, 1000).total for _ in range(times)]
    return losses, gradients_of(lm)


@pytest.mark.parametrize(("policy", "k"), [*((policy, 1) for policy in MATRIX), ("segmented", 0), ("segmented", "all")])
def test_recorded_passes_give_the_same_gradients(lm, monkeypatch, policy, k):
    monkeypatch.setattr(passes, "_RECORDED_AT", 1)
    expected_losses, expected = gradients(lm, SegmentedTrainer(lm, MATRIX[policy], k=k, chunk_tokens=16, record=False))
    trainer = SegmentedTrainer(lm, MATRIX[policy], k=k, chunk_tokens=16, checkpoint_layers=k == 1, record=True)
    losses, ours = gradients(lm, trainer)
    assert bool(trainer._passes._wholes) == (policy not in NEVER)
    assert losses == pytest.approx(expected_losses, rel=1e-12)
    assert_same_gradients(ours, expected)


@pytest.mark.parametrize(("k", "sizes"), [(0, (128,)), (1, (2, 5)), ("all", (2, 5))])
@pytest.mark.parametrize("policy", MATRIX)
def test_turns_that_are_recorded_give_the_same_gradients(lm, monkeypatch, policy, k, sizes):
    monkeypatch.setattr(passes, "_RECORDED_AT", 2)
    monkeypatch.setattr(parts, "SIZES", sizes)
    plain = SegmentedTrainer(lm, MATRIX[policy], k=k, chunk_tokens=16, record=False)
    expected_losses, expected = gradients(lm, plain, stream=CHAT)
    trainer = SegmentedTrainer(lm, MATRIX[policy], k=k, chunk_tokens=16, checkpoint_layers=k == 0, record=True)
    losses, ours = gradients(lm, trainer, stream=CHAT)
    assert policy.startswith(GROWING) or {kind.tokens for kind in trainer._passes._parts} == set(sizes)
    assert losses == pytest.approx(expected_losses, rel=1e-12)
    assert_same_gradients(ours, expected)


def test_recorded_passes_see_what_others_wrote_between_them(lm, monkeypatch):
    """Tokens that run again, where there is room for them already, leave a state's version as it is."""

    def hidden(recorded: set[int]) -> torch.Tensor:
        runner = Runner(lm, MATRIX["segmented"])
        ours, state = passes.Passes(runner, record=True), runner.begin()
        for i, tokens_T in enumerate((STREAM[:5], STREAM[11:15], STREAM[5:10])):
            monkeypatch.setattr(passes, "_RECORDED_AT", 1 if i in recorded else 99)
            if i == 1:
                state.rewind(len(tokens_T))
            out = ours.pass_over(tokens_T, state)
            state.length += len(tokens_T)
            state.filled += len(tokens_T)
        return out.detach()

    torch.testing.assert_close(hidden({0, 2}), hidden(set()), rtol=0, atol=1e-12)


def test_a_kind_that_comes_again_and_again_is_recorded_once(lm, monkeypatch):
    recordings = []
    record = passes.Whole
    monkeypatch.setattr(passes, "Whole", lambda *given: recordings.append(given) or record(*given))
    trainer = SegmentedTrainer(lm, MATRIX["segmented"], k=0, chunk_tokens=16, record=True)
    longer = TrainingStream("longer", STREAM[:120])
    plain = SegmentedTrainer(lm, MATRIX["segmented"], k=0, chunk_tokens=16, record=False)
    expected_losses, expected = gradients(lm, plain, stream=longer, times=3)
    losses, ours = gradients(lm, trainer, stream=longer, times=3)
    assert len(recordings) == 1
    assert losses == pytest.approx(expected_losses, rel=1e-12)
    assert_same_gradients(ours, expected)


def test_what_never_comes_again_is_not_recorded(lm):
    trainer = SegmentedTrainer(lm, MATRIX["full"], k=1, chunk_tokens=16, record=True)
    gradients(lm, trainer, times=2)
    assert not trainer._passes._wholes


def test_no_gradient_of_a_broken_step_is_left(lm, monkeypatch):
    monkeypatch.setattr(passes, "_RECORDED_AT", 1)
    expected = gradients(lm, SegmentedTrainer(lm, MATRIX["segmented"], k=0, chunk_tokens=16, record=False))[1]
    trainer = SegmentedTrainer(lm, MATRIX["segmented"], k=0, chunk_tokens=16, record=True)
    trainer.loss_and_grad(TEXT, 1000)
    trainer._passes._sums._sums[0].fill_(1)  # as if the step had broken off before they were collected
    gradients_of(lm)
    assert_same_gradients(gradients(lm, trainer)[1], expected)
