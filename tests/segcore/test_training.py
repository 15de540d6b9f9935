"""Training: I2's half of it and I7 (design, section 10), in fp64 on tiny random models, for every policy."""

from __future__ import annotations

import gc
import itertools
import weakref
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from segcore.config import Cell
from segcore.engine.runner import Runner
from segcore.errors import ConfigError, InvalidInput, NonFiniteLoss, StorageFull
from segcore.model import CausalLM
from segcore.policies import POLICIES, lagkv
from segcore.policies.retrieving import RetrievingPolicy
from segcore.training.optimizer import MasterOptimizer
from segcore.training.past import RecordedPast
from segcore.training.stream import IGNORED, TrainingStream
from segcore.training.tbptt import SegmentedTrainer
from segcore.weights import load_model
from tests.conftest import VOCABULARY, tiny_segment
from tests.segcore.test_invariants import MARKS, MATRIX, STREAM
from tests.segcore.unrolled import (
    Serving,
    assert_same_gradients,
    gradients_of,
    one_pass_gradients,
    trained_model,
    unrolled,
)

# Four segments of 16, so that K = 2 cuts; not a multiple of the segment.
SHORT = TrainingStream("short", STREAM[:58], marks=(21, 37, 48))
LONG = TrainingStream("long", STREAM, marks=MARKS)
DEPTHS = (0, 1, 2, "all")
# Any number: gradients are divided by it.
VALID = 1000


@pytest.fixture(scope="module")
def gqa() -> CausalLM:
    return trained_model()


@pytest.fixture(scope="module")
def mha() -> CausalLM:
    return trained_model(kv_heads=4)


def trained(lm: CausalLM, policy: str, stream: TrainingStream, **options: object) -> tuple[float, dict[str, Tensor]]:
    """The summed loss of a stream and the gradients that training finds."""
    loss = SegmentedTrainer(lm, MATRIX[policy], **options).loss_and_grad(stream, VALID)  # type: ignore[arg-type]
    assert loss.tokens == stream.valid_tokens
    return loss.total, gradients_of(lm)


# Of a token that is read again one pass would have to hold two.
@pytest.mark.parametrize("policy", [name for name, config in MATRIX.items() if not config.reread_at_marks])
def test_i7_gradients_are_those_of_one_pass_that_sees_what_the_method_says(gqa, policy):
    _, ours = trained(gqa, policy, SHORT, k=1)
    assert_same_gradients(ours, one_pass_gradients(gqa, MATRIX[policy], SHORT, 1, VALID))


@pytest.mark.parametrize("k", [0, 2, "all"])
@pytest.mark.parametrize("policy", MATRIX)
def test_i7_gradients_are_those_of_the_unrolled_recurrence(mha, policy, k):
    loss, ours = trained(mha, policy, SHORT, k=k, chunk_tokens=16)
    expected_loss, expected = unrolled(mha, MATRIX[policy], SHORT, k, 16, VALID)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert_same_gradients(ours, expected)


@settings(max_examples=20, deadline=None)
@given(
    policy=st.sampled_from(sorted(MATRIX)),
    k=st.sampled_from([0, 1, 2, 3, "all"]),
    length=st.integers(1, 90),
    chunk_tokens=st.integers(1, 20),
    checkpoint_layers=st.booleans(),
    marks=st.sets(st.integers(0, 90), max_size=3),
    unmasked=st.sets(st.integers(0, 89), max_size=12),
)
def test_i7_any_stream_cut_masked_and_marked_anyhow(
    gqa, policy, k, length, chunk_tokens, checkpoint_layers, marks, unmasked
):
    labels = torch.where(torch.tensor([t in unmasked for t in range(length)]), STREAM[:length], IGNORED)
    marks = tuple(mark for mark in marks if mark <= length)
    stream = TrainingStream("any", STREAM[:length], labels, marks)
    loss, ours = trained(gqa, policy, stream, k=k, chunk_tokens=chunk_tokens, checkpoint_layers=checkpoint_layers)
    expected_loss, expected = unrolled(gqa, MATRIX[policy], stream, k, chunk_tokens, VALID)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    if stream.valid_tokens:
        assert_same_gradients(ours, expected)
    assert ours.keys() == expected.keys()


@pytest.mark.parametrize("k", DEPTHS)
def test_i7_segments_between_that_have_no_targets(gqa, k):
    """Gradients pass through them, and keep their ages."""
    labels = torch.full_like(STREAM, IGNORED)
    for first in (3, 50, 100, 117):
        labels[first : first + 5] = STREAM[first : first + 5]
    stream = TrainingStream("gaps", STREAM, labels, MARKS)
    assert_same_gradients(
        trained(gqa, "segmented", stream, k=k)[1], unrolled(gqa, MATRIX["segmented"], stream, k, 1024, VALID)[1]
    )


def test_depths_differ(gqa):
    """Each K reaches further than the one before: else equality would prove nothing."""
    for policy in ("segmented", "streaming", "full", "lagkv"):
        found = [trained(gqa, policy, SHORT, k=k)[1] for k in DEPTHS]
        for nearer, further in itertools.pairwise(found):
            assert max((nearer[name] - further[name]).abs().max() for name in nearer) > 1e-4, policy


@pytest.mark.parametrize("policy", MATRIX)
def test_checkpointed_layers_give_the_same_gradients(gqa, policy):
    plain = trained(gqa, policy, SHORT, k=1, chunk_tokens=7)
    again = trained(gqa, policy, SHORT, k=1, chunk_tokens=7, checkpoint_layers=True)
    assert plain[0] == again[0]
    assert_same_gradients(again[1], plain[1])
    assert all("forward" not in vars(layer) for layer in gqa.layers)


# I2: training computes what serving computes.


@dataclass
class Pass:
    """A pass of F: where it began, and what was retrieved for it; whether a graph was built, hidden states."""

    at: int
    retrieved: list[list[int]]
    graph: bool
    hidden_TC: Tensor


@pytest.fixture
def passes(monkeypatch) -> list[Pass]:
    """Every pass that runs meanwhile."""
    seen: list[Pass] = []
    pass_over = Runner.pass_over

    def spying(self, tokens_BT, states, **options):
        at, retrieved = states[0].length, states[0].retrieved_CR.tolist()
        out = pass_over(self, tokens_BT, states, **options)
        seen.append(Pass(at, retrieved, torch.is_grad_enabled(), out[0].detach().clone()))
        return out

    monkeypatch.setattr(Runner, "pass_over", spying)
    return seen


@pytest.mark.parametrize("policy", ["segmented", "full", "lagkv"])
def test_a_score_is_the_loss_and_the_answers_that_greedy_decoding_would_write(gqa, policy):
    serving, logits = Serving(gqa, MATRIX[policy], LONG, 7), []
    with torch.inference_mode():
        while serving.state.length < len(STREAM):
            logits.append(serving.step())
    greedy_T = torch.cat([STREAM[:1], torch.cat(logits).argmax(-1)[:-1]])
    labels_T = torch.full_like(STREAM, IGNORED)
    for answer in (slice(30, 36), slice(50, 51), slice(80, 84)):
        labels_T[answer] = greedy_T[answer]
    labels_T[82] = (labels_T[82] + 1) % VOCABULARY
    stream = TrainingStream("answers", STREAM, labels_T, MARKS)
    assert stream.answers == [range(29, 35), range(49, 50), range(79, 83)]
    score = SegmentedTrainer(gqa, MATRIX[policy], chunk_tokens=7).score(stream)
    assert (score.tokens, score.answers, score.right) == (11, 3, 2)
    assert score.total == pytest.approx(trained(gqa, policy, stream, chunk_tokens=7)[0], rel=1e-12)
    assert SegmentedTrainer(gqa, MATRIX[policy]).score(LONG).answers == 0


@pytest.mark.parametrize(("policy", "k"), [*((name, 1) for name in MATRIX), ("segmented", 0), ("segmented", "all")])
def test_i2_training_computes_what_serving_computes(gqa, passes, policy, k):
    """To the last bit, in both runs: the same passes see the same prefixes."""
    serving, logits = Serving(gqa, MATRIX[policy], LONG, 7), []
    with torch.inference_mode():
        while serving.state.length < len(STREAM):
            logits.append(serving.step())
    served = {(step.at, str(step.retrieved)): step for step in passes}  # what is read again begins where others do
    passes.clear()
    loss, _ = trained(gqa, policy, LONG, k=k, chunk_tokens=7)
    assert loss == pytest.approx(cross_entropy(torch.cat(logits), LONG.targets_T, reduction="sum").item(), rel=1e-12)
    assert {(step.at, str(step.retrieved)) for step in passes if step.graph} == served.keys()
    for step in passes:
        assert torch.equal(step.hidden_TC, served[step.at, str(step.retrieved)].hidden_TC)


@pytest.mark.parametrize("policy", [n for n, c in MATRIX.items() if c.policy in ("segmented", "ltri", "lagkv")])
def test_a_segment_that_runs_again_chooses_nothing_anew(gqa, policy, monkeypatch):
    """A nearly tied choice might fall out otherwise, in low precision; and a search costs time."""
    calls, appended, kind = [], [], POLICIES[MATRIX[policy].policy]
    if issubclass(kind, RetrievingPolicy):
        choose = kind.choose
        spying = lambda self, state, *rest: calls.append(state.events) or choose(self, state, *rest)  # noqa: E731
        monkeypatch.setattr(kind, "choose", spying)
    else:
        score = lagkv.score_lag
        monkeypatch.setattr(lagkv, "score_lag", lambda k_LD, *z: calls.append(float(k_LD.sum())) or score(k_LD, *z))
    append = RecordedPast.append
    monkeypatch.setattr(RecordedPast, "append", lambda past, *z: appended.append(past.segments) or append(past, *z))
    trained(gqa, policy, LONG, k=1)
    assert len(calls) == len(set(calls))
    assert appended == list(range(len(appended)))
    assert len(appended) <= len(STREAM) // MATRIX[policy].segment_tokens
    assert bool(calls) == (policy != "segmented-local-only")


# What it takes.


class Saved:
    """Counts the bytes that graphs hold."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def pack(self, tensor: Tensor) -> list[Tensor]:
        holder = _Holder([tensor])
        self.live += tensor.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(holder, self._free, tensor.nbytes)
        return holder

    def _free(self, nbytes: int) -> None:
        self.live -= nbytes

    def __enter__(self) -> Saved:
        gc.collect()
        gc.disable()  # so that nothing may lie in a cycle
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda holder: holder[0])
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()
        gc.enable()


class _Holder(list[Tensor]):
    """A list that can be watched."""


BOUNDED = [name for name, config in MATRIX.items() if POLICIES[config.policy].bounded]


@pytest.mark.parametrize(
    ("policy", "k"), [*((name, 1) for name in BOUNDED), *(("segmented", k) for k in (0, 2, "all"))]
)
def test_what_graphs_hold_does_not_grow(gqa, policy, k):
    peaks = []
    for segments in (6, 16):
        stream = TrainingStream("long", STREAM.repeat(2)[: segments * MATRIX[policy].segment_tokens])
        with Saved() as saved:
            trained(gqa, policy, stream, k=k)
        assert saved.live == 0
        peaks.append(saved.peak)
    assert 0 < peaks[1] <= 1.01 * peaks[0]  # spans may fill the retrieved prefix less or more


def test_checkpointed_layers_hold_less(gqa):
    peaks = []
    for checkpoint_layers in (False, True):
        with Saved() as saved:
            trained(gqa, "segmented", LONG, checkpoint_layers=checkpoint_layers)
        assert saved.live == 0
        peaks.append(saved.peak)
    assert peaks[1] < peaks[0] / 2


@pytest.mark.parametrize(("k", "built"), [(0, {96}), (1, {80, 96}), (2, {64, 80, 96}), ("all", set(range(0, 97, 16)))])
def test_only_segments_that_a_gradient_reaches_are_built(gqa, passes, k, built):
    """A long document with a short answer."""
    labels = STREAM.clone()
    labels[:100] = IGNORED
    labels[110:] = IGNORED
    trained(gqa, "segmented", TrainingStream("answer", STREAM, labels), k=k)
    assert {step.at for step in passes if step.graph} == built
    assert max(step.at for step in passes) == 96


def test_past_kv_is_let_go_of(gqa):
    trainer = SegmentedTrainer(gqa, MATRIX["segmented"])
    trainer.loss_and_grad(LONG, VALID)
    assert trainer._manager.used_bytes == {"host": 0}
    trainer._manager.check_integrity()
    gradients_of(gqa)


# The seam: what is trained, and what is refused.


class LowRank(nn.Module):
    """A linear layer with a trained part of rank 2 beside it, as an adapter has."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layer = layer
        self.down = nn.Parameter(torch.randn(2, layer.in_features, generator=generator, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(layer.out_features, 2, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("where", ["both", "last", "head"])
@pytest.mark.parametrize("k", DEPTHS)
def test_an_adapter_alone_is_trained(where, k):
    """In the last layer alone, or the head: then no gradient passes through what some layers, or all, carry over."""
    lm = trained_model()
    lm.model.requires_grad_(False)
    for layer in lm.layers[{"both": 0, "last": 1, "head": 2}[where] :]:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
        layer.self_attn.v_proj = LowRank(layer.self_attn.v_proj)
    if where == "head":
        lm.model.lm_head = LowRank(lm.model.lm_head)
    loss, ours = trained(lm, "segmented", SHORT, k=k)
    expected_loss, expected = unrolled(lm, MATRIX["segmented"], SHORT, k, 16, VALID)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert_same_gradients(ours, expected)
    assert all("up" in name or "down" in name for name in ours)


def test_a_model_that_has_served_can_be_trained(gqa):
    """What serving leaves behind, tables of angles and masks, is of use to autograd."""
    with torch.inference_mode():
        gqa.rope.keys(torch.zeros(1, 5000, 8, dtype=torch.float64), 0)
        serving = Serving(gqa, MATRIX["full"], SHORT, 16)
        while serving.state.length < 58:
            serving.step()
    trained(gqa, "full", SHORT)


def test_dropout_is_off():
    lm = trained_model()
    lm.layers[0].mlp.down_proj = nn.Sequential(lm.layers[0].mlp.down_proj, nn.Dropout(0.5))
    lm.model.train()
    assert trained(lm, "segmented", SHORT)[0] == trained(lm, "segmented", SHORT)[0]


def test_gradients_of_streams_add_up(gqa):
    trainer = SegmentedTrainer(gqa, MATRIX["segmented"])
    apart = []
    for stream in (SHORT, LONG):
        trainer.loss_and_grad(stream, VALID)
        apart.append(gradients_of(gqa))
    for stream in (SHORT, LONG):
        trainer.loss_and_grad(stream, VALID)
    together = gradients_of(gqa)
    assert_same_gradients(together, {name: apart[0][name] + apart[1][name] for name in together})


@pytest.mark.parametrize("k", DEPTHS)
def test_a_loss_that_is_no_number_names_its_stream(k):
    lm = trained_model()
    lm.model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(NonFiniteLoss, match="short") as raised:
        trained(lm, "segmented", SHORT, k=k)
    assert raised.value.details["stream"] == "short"


def test_a_stream_that_cannot_be_run_is_refused(gqa):
    full, segmented = (SegmentedTrainer(gqa, MATRIX[name]) for name in ("full", "segmented"))
    with pytest.raises(InvalidInput, match="512 positions"):
        full.loss_and_grad(TrainingStream("long", STREAM.repeat(4)), 10_000)
    with pytest.raises(InvalidInput, match="vocabulary of 300"):
        segmented.loss_and_grad(TrainingStream("ids", torch.tensor([5, VOCABULARY])), 1)
    with pytest.raises(InvalidInput, match="valid_tokens=56"):
        segmented.loss_and_grad(SHORT, 56)
    tight = SegmentedTrainer(gqa, tiny_segment(), host_bytes=10_000)
    with pytest.raises(StorageFull):
        tight.loss_and_grad(LONG, VALID)
    assert tight._manager.used_bytes == {"host": 0}
    assert gradients_of(gqa) == {}


def test_a_trainer_that_cannot_train_is_refused(gqa):
    for k in (-1, "every", 1.5):
        with pytest.raises(ConfigError, match="k="):
            SegmentedTrainer(gqa, tiny_segment(), k=k)
    with pytest.raises(ConfigError, match="chunk_tokens"):
        SegmentedTrainer(gqa, tiny_segment(), chunk_tokens=0)
    frozen = trained_model()
    frozen.model.requires_grad_(False)
    scorer, stream = SegmentedTrainer(frozen, tiny_segment()), TrainingStream("s", STREAM[:40])
    assert scorer.score(stream).tokens == 39
    with pytest.raises(ConfigError, match="requires_grad_"):
        scorer.loss_and_grad(stream, 39)


def test_a_model_in_bfloat16_learns_a_stream_by_heart(model_directory):
    lm = load_model(str(model_directory), dtype="bfloat16", device="cpu", trainable=True).lm
    trainer = SegmentedTrainer(lm, tiny_segment(selectors=(Cell(0, 1),)), checkpoint_layers=True)
    optimizer = MasterOptimizer(trainer.parameters, partial(torch.optim.AdamW, lr=1e-2))
    stream, means = TrainingStream("text", STREAM[:70] % 256), []
    for _ in range(15):
        means.append(trainer.loss_and_grad(stream, stream.valid_tokens).mean)
        optimizer.step()
    assert {p.dtype for p in trainer.parameters} == {torch.bfloat16}
    assert means[-1] < means[0] / 2


def test_a_model_that_was_loaded_for_inference_is_refused(model_directory):
    lm = load_model(str(model_directory), dtype="bfloat16", device="cpu").lm
    lm.model.requires_grad_(True)
    trainer = SegmentedTrainer(lm, tiny_segment(selectors=(Cell(0, 1),)))
    with pytest.raises(ConfigError, match="trainable=True"):
        trainer.loss_and_grad(TrainingStream("s", STREAM[:40] % 256), 39)
