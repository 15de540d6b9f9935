"""Training's parts, one by one: streams, the loss of a head, the optimizer, a past that is run twice."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import GraniteConfig, GraniteForCausalLM

from segcore.config import CacheConfig
from segcore.errors import InvalidInput, NonFiniteLoss
from segcore.model import CausalLM
from segcore.pastkv.manager import PastKVManager
from segcore.training.loss import head_loss_and_grad, head_loss_and_hits
from segcore.training.optimizer import MasterOptimizer
from segcore.training.past import RecordedPast
from segcore.training.stream import IGNORED, TrainingStream
from tests.conftest import VOCABULARY, tiny_model

TOKENS = torch.tensor([3, 1, 4, 1, 5])


def test_a_position_predicts_the_next_tokens_label():
    plain = TrainingStream("plain", TOKENS)
    assert plain.targets_T.tolist() == [1, 4, 1, 5, IGNORED]
    assert plain.valid_tokens == 4
    masked = TrainingStream("masked", TOKENS, torch.tensor([3, IGNORED, 4, IGNORED, 7]))
    assert masked.targets_T.tolist() == [IGNORED, 4, IGNORED, 7, IGNORED]
    assert masked.valid_tokens == 2
    assert TrainingStream("one", TOKENS[:1]).valid_tokens == 0
    assert TrainingStream("taught", TOKENS, marks=(3, 5), needed={3: ((0, 1), (2, 3))}).needed[3] == ((0, 1), (2, 3))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tokens_T": TOKENS[:0]}, "at least one token"),
        ({"tokens_T": TOKENS.int()}, "int64"),
        ({"tokens_T": TOKENS[None]}, "one row"),
        ({"tokens_T": TOKENS, "labels_T": TOKENS[1:]}, "a label for each token"),
        ({"tokens_T": TOKENS, "labels_T": TOKENS.double()}, "its labels"),
        ({"tokens_T": TOKENS, "marks": (2, 6)}, "a mark lies outside"),
        ({"tokens_T": TOKENS, "marks": (-1,)}, "a mark lies outside"),
        ({"tokens_T": TOKENS, "marks": (3,), "needed": {2: ((0, 1),)}}, "what mark 2 needs"),
        ({"tokens_T": TOKENS, "marks": (3,), "needed": {3: ()}}, "what mark 3 needs"),
        ({"tokens_T": TOKENS, "marks": (3,), "needed": {3: ((0, 2), (2, 4))}}, "what mark 3 needs"),
        ({"tokens_T": TOKENS, "marks": (3,), "needed": {3: ((1, 1),)}}, "what mark 3 needs"),
        ({"tokens_T": TOKENS, "marks": (3,), "needed": {3: ((-1, 1),)}}, "what mark 3 needs"),
    ],
)
def test_what_is_no_stream_is_refused_by_name(values, words):
    with pytest.raises(InvalidInput, match=words) as raised:
        TrainingStream("mine", **values)
    assert "'mine'" in raised.value.message


def test_ids_outside_the_vocabulary_are_refused():
    TrainingStream("ok", TOKENS, torch.where(TOKENS == 1, IGNORED, TOKENS)).check_vocabulary(6)
    TrainingStream("one", TOKENS[:1]).check_vocabulary(6)
    for stream in (TrainingStream("a", TOKENS - 2), TrainingStream("b", TOKENS, torch.where(TOKENS == 1, -7, TOKENS))):
        with pytest.raises(InvalidInput, match="vocabulary of 6"):
            stream.check_vocabulary(6)
    with pytest.raises(InvalidInput, match="vocabulary of 5"):
        TrainingStream("c", TOKENS).check_vocabulary(5)


def granite() -> GraniteForCausalLM:
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = GraniteConfig(vocab_size=VOCABULARY, num_key_value_heads=2, logits_scaling=5.0, **shape)
    return GraniteForCausalLM(config).double()


@pytest.mark.parametrize("make", [tiny_model, granite])
@pytest.mark.parametrize("logits", [1, 7 * VOCABULARY, 10**6])
def test_a_heads_loss_is_cross_entropy_of_all_logits(make, logits, monkeypatch):
    """By the model's own head, Granite's division of its logits included; but never all logits at once."""
    lm = CausalLM(make())
    lm.model.requires_grad_(True)
    random = torch.Generator().manual_seed(5)
    hidden_TC = torch.randn(20, 32, dtype=torch.float64, generator=random, requires_grad=True)
    targets_T = torch.randint(0, VOCABULARY, (20,), generator=random)
    targets_T[[0, 7, 8, 19]] = IGNORED
    own = lm.model.lm_head(hidden_TC) / getattr(lm.model.config, "logits_scaling", 1.0)
    expected = cross_entropy(own, targets_T, ignore_index=IGNORED, reduction="sum")
    (expected / 9).backward()
    expected_head, lm.model.lm_head.weight.grad = lm.model.lm_head.weight.grad, None

    rows, head = [], CausalLM.head
    monkeypatch.setattr(
        CausalLM, "head", lambda self, x, **options: rows.append(x.shape[1]) or head(self, x, **options)
    )
    loss, gradient_TC = head_loss_and_grad(lm, hidden_TC, targets_T, 1 / 9, logits)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient_TC, hidden_TC.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(lm.model.lm_head.weight.grad, expected_head, rtol=0, atol=1e-12)
    assert max(rows) <= max(1, logits // VOCABULARY)
    assert sum(rows) == 16


@pytest.mark.parametrize("logits", [1, 5 * VOCABULARY, 2**25])
def test_a_score_in_pieces_is_the_score(logits):
    lm = CausalLM(tiny_model())
    hidden_TC = torch.randn(20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    own = lm.model.lm_head(hidden_TC)
    targets_T = own.argmax(-1)
    targets_T[3:9] = (targets_T[3:9] + 1) % VOCABULARY
    targets_T[[0, 7, 19]] = IGNORED
    loss, hits_T = head_loss_and_hits(lm, hidden_TC, targets_T, logits)
    assert loss == pytest.approx(cross_entropy(own, targets_T, ignore_index=IGNORED, reduction="sum").item(), rel=1e-12)
    assert hits_T.tolist() == [t not in (0, 3, 4, 5, 6, 7, 8, 19) for t in range(20)]


def test_a_heads_loss_is_taken_in_fp32():
    lm = CausalLM(tiny_model(dtype=torch.bfloat16))
    hidden_TC = torch.randn(4, 32, generator=torch.Generator().manual_seed(5)).bfloat16()
    targets_T = torch.tensor([1, 2, 3, IGNORED])
    loss, gradient_TC = head_loss_and_grad(lm, hidden_TC, targets_T, 1.0)
    assert loss == pytest.approx(cross_entropy(lm.head(hidden_TC[None])[0].float(), targets_T, reduction="sum").item())
    assert gradient_TC.dtype == torch.bfloat16


# --- The optimizer ---


def descend(parameter: nn.Parameter, gradient: float) -> None:
    """A backward pass whose gradient is the same for every element."""
    (parameter * gradient).sum().backward()


def test_small_steps_and_small_gradients_are_not_lost_in_bfloat16():
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = MasterOptimizer([weight], partial(torch.optim.SGD, lr=1e-4), max_norm=None)
    for _ in range(100):
        descend(weight, 1.0)  # in bfloat16, 1 - 1e-4 is 1
        optimizer.step()
    torch.testing.assert_close(optimizer.masters[0].detach(), torch.full((3,), 0.99))
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.99).bfloat16(), rtol=0, atol=0)
    descend(weight, 256.0)
    for _ in range(64):
        descend(weight, 0.5)  # in bfloat16, 256.5 is 256
    (gradient,) = optimizer.gradients
    assert gradient.tolist() == [288.0] * 3
    assert weight.grad is None


def test_parameters_in_fp32_are_their_own_masters():
    weight = nn.Parameter(torch.ones(3))
    optimizer = MasterOptimizer([weight], partial(torch.optim.SGD, lr=0.1), max_norm=None)
    descend(weight, 2.0)
    optimizer.step()
    assert optimizer.masters[0] is weight
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.8))
    assert optimizer.gradients[0].tolist() == [0.0] * 3


def test_gradients_are_clipped_all_together():
    weights = [nn.Parameter(torch.zeros(1, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    optimizer = MasterOptimizer(weights, partial(torch.optim.SGD, lr=1.0), max_norm=1.0)
    for weight, gradient in zip(weights, (3.0, 4.0), strict=True):
        descend(weight, gradient)
    assert optimizer.step() == pytest.approx(5.0)
    assert [master.item() for master in optimizer.masters] == pytest.approx([-0.6, -0.8], rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_moves_by_a_gradient_that_is_no_number(bad):
    weights = [nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    optimizer = MasterOptimizer(weights, partial(torch.optim.AdamW, lr=0.1))
    for weight, gradient in zip(weights, (1.0, bad), strict=True):
        descend(weight, gradient)
    with pytest.raises(NonFiniteLoss, match=str(bad)):
        optimizer.step()
    assert all((weight == 1).all() for weight in (*weights, *optimizer.masters))
    assert not optimizer.optimizer.state
    optimizer.zero_grad()
    descend(weights[0], 1.0)
    assert optimizer.step() == pytest.approx(2**0.5)


def test_a_saved_optimizer_goes_on_as_if_never_interrupted():
    def steps(optimizer, weight, count):
        for i in range(count):
            descend(weight, 1.0 + i % 3)
            optimizer.step()

    make = partial(torch.optim.AdamW, lr=1e-3)
    whole = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    steps(MasterOptimizer([whole], make), whole, 12)
    first = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    before = MasterOptimizer([first], make)
    steps(before, first, 6)
    second = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    after = MasterOptimizer([second], make)
    after.load_state_dict(before.state_dict())
    assert torch.equal(second, first)
    steps(after, second, 6)
    assert torch.equal(second, whole)


# --- A past that is run twice ---


def test_a_decision_is_taken_once():
    past = RecordedPast(PastKVManager(CacheConfig()), None)
    asked: list[int] = []

    def choose(answer: int) -> torch.Tensor:
        asked.append(answer)
        return torch.tensor([answer])

    assert [past.decide(partial(choose, n)).item() for n in (1, 2, 3)] == [1, 2, 3]
    past.rewind(1)
    assert [past.decide(partial(choose, n)).item() for n in (7, 8, 9)] == [2, 3, 9]
    assert past.decided == 4
    assert asked == [1, 2, 3, 9]
