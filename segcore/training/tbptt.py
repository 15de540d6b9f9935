"""Backpropagation through a stream's segments, exactly truncated, in memory that doesn't grow with the stream.

F makes of segment s and the state C(s-1) before it the next state C(s), and the segment's loss. With K, the gradient of
that loss reaches the tokens of segments s, s-1, ..., s-K, through the keys and values that a close carries over; past
KV, choices and the query window carry none (design, section 8). The values are those of the whole recurrence.

A first run without gradient keeps the state before each segment, as one row of numbers, in host memory. A second one
walks backwards: it builds a segment's graph anew, with the numbers before it as a leaf, and pulls back
the gradient of the segment's loss together with what later segments left on its outgoing state. The second run repeats
the choices of the first and searches nothing, so that both see the same prefix.

How far a gradient may still go depends on whose it is: at C(s), that of the loss of segment s+j is of age j, and passes
segment s only if j < K. So ages are pulled back to the incoming state one by one, and to the weights all together. If
nothing is ever cut (K is "all", or the stream is short), one sum of them will do.

What it costs, in forward passes (a backward pass is two: one for activations, one for weights): 3 for K = 0, which
needs no first run; 4 for "all"; 4 + K otherwise. A segment that no gradient reaches isn't built: of a long document
with a short answer, only the last K + 1 segments. Beside these states, about as large as a decode slot each, host
memory holds past KV. States of policies that aren't bounded grow, and their sum with the square of the stream: give
these longer segments.

Shapes: T tokens, C hidden dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from segcore.config import GIB, CacheConfig, SegmentConfig
from segcore.engine.runner import Runner
from segcore.errors import ConfigError, InvalidInput, NonFiniteLoss
from segcore.model import CausalLM
from segcore.packed import is_for_inference
from segcore.pastkv.manager import PastKVManager
from segcore.policies.segmented import SegmentedPolicy
from segcore.segments import is_refresh_point, tokens_to_next_cut
from segcore.state import State
from segcore.training.activations import checkpointed
from segcore.training.boundary import Boundary, numbers
from segcore.training.distillation import own_hidden
from segcore.training.loss import head_loss_and_grad, head_loss_and_hits
from segcore.training.passes import Passes
from segcore.training.past import RecordedPast
from segcore.training.selectors import Lesson, SelectorLoss, Teacher, lessons_by_attention, lessons_of
from segcore.training.stream import IGNORED, TrainingStream

Depth = int | Literal["all"]
# Tensors of a graph, each with the gradient that is known of it.
Pulls = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StreamLoss:
    """total: minus log likelihood of a stream's targets, in nats, summed. tokens: how many targets. selectors: what
    was taught to them."""

    total: float
    tokens: int
    selectors: SelectorLoss

    @property
    def mean(self) -> float:
        return self.total / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class StreamScore(StreamLoss):
    """answers: runs of targets behind tokens that aren't. right: those whose every token was the likeliest, which is
    to say that greedy decoding would have written them."""

    answers: int
    right: int


class SegmentedTrainer:
    """Losses and gradients of streams, one at a time, under a policy.

    model: its parameters that ask for gradients are trained: all (`load_model(trainable=True)`), or those of an adapter
    that was added to `model.model`; to score, none need to. Dropout is off: what is trained is what is served.
    k: K above, or "all". chunk_tokens: longest pass; with the engine's, values are the engine's to the last bit.
    checkpoint_layers: keep a layer's input alone, and run it again once per backward pass (K + 1, or one).
    host_bytes: budget for a stream's past KV; more raises StorageFull.

    attention: as the engine's; "auto" measures forward passes alone. record: play passes over whole segments as CUDA
    graphs (`training.passes`); None: on a GPU.

    The model's query maps, if they ask for gradients, are taught what streams say that marks need; with
    `attention_teaches`, of streams that say nothing, what full attention pays to. selector_weight: of their loss.
    """

    def __init__(
        self,
        model: CausalLM,
        config: SegmentConfig,
        *,
        k: Depth = 1,
        chunk_tokens: int = 1024,
        checkpoint_layers: bool = False,
        host_bytes: int = 8 * GIB,
        selector_weight: float = 0.1,
        attention_teaches: bool = False,
        attention: str = "auto",
        record: bool | None = None,
    ) -> None:
        if k != "all" and (not isinstance(k, int) or k < 0):
            raise ConfigError(f"k={k!r} must be a whole number of at least 0, or 'all'")
        if chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens={chunk_tokens} must be at least 1")
        self.model, self.config, self.k, self.chunk_tokens = model, config, k, chunk_tokens
        self._runner, self._checkpoint = Runner(model, config, attention), checkpoint_layers
        self._selector_weight, self._attention_teaches = selector_weight, attention_teaches
        # Nobody may find these blocks: the next step changes the weights that they depend on.
        self._passes = Passes(self._runner, record)
        cache = CacheConfig(host_bytes=host_bytes, reuse=False)
        self._manager = PastKVManager(cache, device=model.spec.device)
        model.model.eval()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for module in self.model.modules for p in module.parameters() if p.requires_grad]

    def lessons(self, stream: TrainingStream) -> dict[int, Lesson]:
        """What the stream can teach the query maps, by the position of the choice. Raises InvalidInput."""
        policy = self._runner.policy
        if not isinstance(policy, SegmentedPolicy) or policy.query_maps is None:
            return {}
        if not policy.query_maps.change_CGDD.requires_grad:
            return {}
        if stream.needed or not self._attention_teaches:
            return lessons_of(stream, policy)
        return lessons_by_attention(self.model, stream, policy)

    @torch.no_grad()
    def loss_and_grad(self, stream: TrainingStream, valid_tokens: int, choices: int | None = None) -> StreamLoss:
        """The stream's loss; adds the gradient of its sum divided by `valid_tokens` to the parameters' `.grad`.

        valid_tokens: targets of all streams of a step, on all workers: then the sum of all gradients is that of one.
        choices: the same for the selectors' loss, `lessons` of all streams; None: of this one.
        Raises ConfigError if nothing can be trained, InvalidInput for a stream that can't be run, NonFiniteLoss, whose
        details name the stream, and PastKVError. After an error the gradients are of no use.
        """
        self._check_trainable()
        self._check(stream, valid_tokens)
        lessons, past = self.lessons(stream), RecordedPast(self._manager, self._runner.policy.layout)
        weight = self._selector_weight / max(1, len(lessons) if choices is None else choices)
        teacher = Teacher(self._runner.policy, lessons, weight, stream.name)
        own_TC = own_hidden(self.model, stream) if stream.distilled else None
        try:
            with checkpointed(self.model.layers) if self._checkpoint else nullcontext():
                self._passes.forget()
                chunk, share = self.chunk_tokens, 1 / valid_tokens
                run = _Unrolled(self._runner, self._passes, stream, past, self.k, chunk, share, teacher, own_TC)
                total = run.total()
                self._passes.collect()
        finally:
            past.truncate(0)
        return StreamLoss(total, stream.valid_tokens, teacher.loss)

    @torch.no_grad()
    def score(self, stream: TrainingStream) -> StreamScore:
        """The stream's loss and its answers, without gradients. Raises as `loss_and_grad` does."""
        self._check(stream, max(1, stream.valid_tokens))
        past = RecordedPast(self._manager, self._runner.policy.layout)
        try:
            untaught = Teacher(self._runner.policy, {}, 0.0, stream.name)
            passes = Passes(self._runner, record=False)
            run = _Unrolled(self._runner, passes, stream, past, 0, self.chunk_tokens, 0.0, untaught)
            total, hits_T = run.scored()
        finally:
            past.truncate(0)
        right = sum(bool(hits_T[answer.start : answer.stop].all()) for answer in stream.answers)
        return StreamScore(total, stream.valid_tokens, untaught.loss, len(stream.answers), right)

    def _check_trainable(self) -> None:
        if is_for_inference(self.model.model):
            raise ConfigError("the model's weights are packed for inference: load_model(..., trainable=True)")
        if not self.parameters:
            raise ConfigError(
                "no parameter asks for gradients: call model.model.requires_grad_(True), or add an adapter to it"
            )

    def _check(self, stream: TrainingStream, valid_tokens: int) -> None:
        stream.check_vocabulary(self.model.spec.vocabulary)
        most = self._runner.policy.max_stream_tokens
        if most is not None and len(stream.tokens_T) > most:
            raise InvalidInput(
                f"stream {stream.name!r} has {len(stream.tokens_T)} tokens, and {self.model.spec.architecture} was"
                f" trained on {most} positions, which policy {self.config.policy!r} keeps"
            )
        if valid_tokens < max(1, stream.valid_tokens):
            raise InvalidInput(f"valid_tokens={valid_tokens} must count the targets of all streams")


class _Unrolled:
    """One stream's recurrence, there and back."""

    def __init__(
        self,
        runner: Runner,
        passes: Passes,
        stream: TrainingStream,
        past: RecordedPast,
        k: Depth,
        chunk_tokens: int,
        weight: float,
        teacher: Teacher,
        own_TC: Tensor | None = None,
    ) -> None:
        self._own_TC = own_TC
        self._runner, self._stream, self._past, self._weight = runner, stream, past, weight
        self._passes, self._teacher = passes, teacher
        self._chunk_tokens, self._size = chunk_tokens, runner.config.segment_tokens
        self._device = runner.model.spec.device
        targets = (stream.targets_T != IGNORED).nonzero()
        # Where segments begin; what comes after the last target changes nothing.
        self._firsts = range(0, int(targets[-1]) + 1 if len(targets) else 0, self._size)
        # None: nothing is ever cut.
        self._k = None if k == "all" or k >= len(self._firsts) - 1 else k

    def total(self) -> float:
        """The summed loss; gradients are added to the parameters' `.grad`."""
        return self._forwards() if self._k == 0 else self._backwards()

    def scored(self) -> tuple[float, Tensor]:
        """The summed loss, and at which positions the likeliest token is the target; no gradients."""
        total, state = 0.0, self._runner.begin()
        hits_T = torch.zeros(len(self._stream.tokens_T), dtype=torch.bool)
        for first in self._firsts:
            hidden_TC = self._segment(state)
            here = slice(first, first + len(hidden_TC))
            loss, hits_T[here] = head_loss_and_hits(self._runner.model, hidden_TC, self._stream.targets_T[here])
            total += self._finite(first, loss)
        return total, hits_T

    def _forwards(self) -> float:
        """K = 0: a segment's graph begins with the segment, so one run will do."""
        total, state = 0.0, self._runner.begin()
        for first in self._firsts:
            total += self._forward(first, state)
            if state.filled == 0:
                closed = Boundary.of(state, self._past.decided)
                state = closed.state(closed.numbers_n)
        return total

    def _forward(self, first: int, state: State) -> float:
        """A segment's loss, and its gradients. Its graph ends here: a recording mustn't meet another one's nodes."""
        with torch.set_grad_enabled(self._has_targets(first)):
            hidden_TC = self._segment(state)
        loss, pulls = self._loss(first, hidden_TC)
        _backward(pulls)
        return loss

    def _backwards(self) -> float:
        total, boundaries = 0.0, self._boundaries()
        ages: list[Tensor | None] = []
        for first in reversed(self._firsts):
            before = boundaries.pop()
            if self._has_targets(first) or any(age is not None for age in ages):
                loss, ages = self._pull_back(first, before, ages)
                total += loss
        return total

    def _boundaries(self) -> list[Boundary]:
        """The first run: what is before each segment."""
        state = self._runner.begin()
        boundaries = [Boundary.of(state, self._past.decided).on_host()]
        for _ in self._firsts[1:]:
            self._segment(state)
            boundaries.append(Boundary.of(state, self._past.decided).on_host())
        return boundaries

    def _pull_back(
        self, first: int, before: Boundary, ages: Sequence[Tensor | None]
    ) -> tuple[float, list[Tensor | None]]:
        """Build a segment's graph and take its backward passes.

        ages: gradients of the numbers of the state after it, the youngest, of age 1, first. Returns the segment's loss
        and the ages of the state before it.
        """
        # Of all states this one and the next are on the device, and gradients never leave it.
        leaf_n = before.numbers_n.to(self._device, non_blocking=True).requires_grad_()
        self._past.rewind(before.decided)
        with torch.enable_grad():
            state = before.state(leaf_n)
            hidden_TC = self._segment(state)
            after_n = numbers(state) if ages else None
        loss, pulls = self._loss(first, hidden_TC)
        by_age = [pulls, *([] if age is None or after_n is None else [(after_n, age)] for age in ages)]
        with self._passes.inputs_alone():
            older = [] if self._k is None else [_pulled(pulls, leaf_n) for pulls in by_age[: self._k]]
        _backward([pull for pulls in by_age for pull in pulls])
        return loss, [leaf_n.grad] if self._k is None else older

    def _segment(self, state: State) -> Tensor:
        """F from a segment's first token to its last or the stream's; hidden states, [T, C]."""
        stream, hidden = self._stream, []
        marks = stream.marks if self._passes.cut_at_marks else ()
        stop = min(state.length + self._size, len(stream.tokens_T))
        while (at := state.length) < stop:
            if at in marks:
                self._runner.choose_at_mark(state, self._past)
                self._teacher.see(state, self._past)
                self._runner.reread(state, self._past, lambda tokens_T: self._passes.pass_over(tokens_T, state))
            end = min((mark for mark in marks if at < mark < stop), default=stop)
            count = min(tokens_to_next_cut(state.filled, self._runner.config, self._chunk_tokens), end - at)
            count = self._passes.most(state, count)
            hidden.append(self._passes.hidden(stream.tokens_T[at : at + count], state, self._past))
            self._runner.arrive(state, self._past, count, None)
            if state.filled == 0 or is_refresh_point(state.filled, self._runner.config):  # it has chosen
                self._teacher.see(state, self._past)
        return torch.cat(hidden)

    def _has_targets(self, first: int) -> bool:
        return bool((self._stream.targets_T[first : first + self._size] != IGNORED).any())

    def _loss(self, first: int, hidden_TC: Tensor) -> tuple[float, Pulls]:
        """A segment's summed loss, and the gradient that it puts on the hidden states."""
        if not self._has_targets(first):
            return 0.0, []
        here = slice(first, first + len(hidden_TC))
        own_TC = None if self._own_TC is None else self._own_TC[here]
        loss, gradient_TC = head_loss_and_grad(
            self._runner.model, hidden_TC, self._stream.targets_T[here], self._weight, own_TC=own_TC
        )
        return self._finite(first, loss), [(hidden_TC, gradient_TC)]

    def _finite(self, first: int, loss: float) -> float:
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"stream {self._stream.name!r}: the loss of its tokens from {first} on is {loss}",
                stream=self._stream.name,
                first=first,
            )
        return loss


def _backward(pulls: Pulls) -> None:
    """Add gradients to all leaves, parameters and others."""
    if pulls := [pull for pull in pulls if pull[0].requires_grad]:
        tensors, gradients = zip(*pulls, strict=True)
        torch.autograd.backward(tensors, gradients)


def _pulled(pulls: Pulls, leaf_n: Tensor) -> Tensor | None:
    """The leaf's gradient alone, if it has one; the graph stays."""
    if not (pulls := [pull for pull in pulls if pull[0].requires_grad]):
        return None
    tensors, gradients = zip(*pulls, strict=True)
    (found,) = torch.autograd.grad(tensors, [leaf_n], gradients, retain_graph=True, allow_unused=True)
    return cast(Tensor | None, found)
