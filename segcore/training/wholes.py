"""Passes over whole segments, each kind as CUDA graphs: one forward, two backward.

All whole segments of a stream have one shape, once its prefixes are full: so a pass is recorded, with what its backward
pass does, and played for every segment after it. What comes before and behind a pass, embedding, choices and closes,
runs as ever.

Shapes: T tokens, C hidden dimension, H KV heads, G query heads per KV head, N rows of a prefix, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from segcore.engine.runner import Runner
from segcore.state import State, Window
from segcore.training.boundary import prefix
from segcore.training.recorder import GradientSums, RecordedAttention, Recorder


class Seen(NamedTuple):
    """What a pass knows of a window: KV heads, rows of its prefix, and the position of the segment's first token."""

    heads: tuple[int, ...]
    prefix: int
    position: int


def whole_kind(state: State) -> Kind:
    """Of a state between two segments."""
    return tuple(tuple(Seen(w.heads, w.base - w.start, w.position) for w in windows) for windows in state.layers)


# Windows by layer.
Kind = tuple[tuple[Seen, ...], ...]


def prefixes_of(state: State) -> list[Tensor]:
    """What a pass is given of each window: keys, rotated keys and values of its prefix, [H, N, D] each."""
    return [x for windows in state.layers for window in windows for x in prefix(window)]


def take(state: State, made: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Let windows be what a pass made: keys, rotated keys and values of prefix and segment, [H, N + T, D] each."""
    rows = iter(made)
    state.layers = [
        [Window(w.heads, *next(rows), 0, w.base - w.start, w.position) for w in windows] for windows in state.layers
    ]


class Whole:
    """A kind of pass, and where it finds and leaves everything."""

    def __init__(
        self, runner: Runner, kind: Kind, sums: GradientSums, embedded_TC: Tensor, prefixes: list[Tensor]
    ) -> None:
        self._runner, self._kind, self._sums, self._leaves = runner, kind, sums, sums.leaves()
        self._inputs = [embedded_TC.requires_grad_(), *prefixes]
        self._made: list[Tensor] = []
        self._given: list[Tensor] = []
        self._found: dict[bool, list[Tensor | None]] = {}
        record = Recorder(embedded_TC.device)
        # Kernels that are chosen or compiled when they first run have run before it is recorded.
        with record.apart():
            self._forward()
            self._given = [torch.zeros_like(made) for made in self._differentiable]
            self._backward(inputs_alone=False)
        self._made, self._found = [], {}
        self._table = runner.model.rope.table  # graphs know it by its address
        self._play_forward = record(self._forward)
        self._play_backward = {alone: record(partial(self._backward, inputs_alone=alone)) for alone in (False, True)}
        if record.plays:  # the graph's nodes have done their work, and would hold on to the stream
            self._made = [made.detach() for made in self._made]
        sums.take()  # of the trial: not wanted

    def __call__(
        self, embedded_TC: Tensor, prefixes: list[Tensor], inputs_alone: Callable[[], bool]
    ) -> tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor, Tensor]]]:
        """Hidden states, [T, C]; the watched cells' queries; for each window what `take` takes.

        They are good until the next pass. inputs_alone: asked when a backward pass comes.
        """
        # So that a backward pass reaches the weights, whether or not it goes further.
        tie = torch.empty((), device=embedded_TC.device, requires_grad=True)
        made = cast(Any, _Played).apply(self, inputs_alone, tie, embedded_TC, *prefixes)
        windows = sum(map(len, self._kind))
        rows = [tuple(made[1 + 3 * i : 4 + 3 * i]) for i in range(windows)]
        return made[0], [q_GTD.detach() for q_GTD in made[1 + 3 * windows :]], rows

    @torch.no_grad()
    def forward(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Play the pass for other inputs."""
        torch._foreach_copy_(self._inputs, list(given))
        self._play_forward()
        return [made.detach() for made in self._made]

    @torch.no_grad()
    def backward(self, gradients: Sequence[Tensor | None], *, inputs_alone: bool) -> list[Tensor | None]:
        """Play the backward pass; gradients of the inputs, good until the next one."""
        pairs = list(zip(self._given, gradients, strict=False))  # none for queries
        if given := [(mine, gradient) for mine, gradient in pairs if gradient is not None]:
            torch._foreach_copy_([mine for mine, _ in given], [gradient for _, gradient in given])
        if lacking := [mine for mine, gradient in pairs if gradient is None]:
            torch._foreach_zero_(lacking)
        self._play_backward[inputs_alone]()
        return list(self._found[inputs_alone])

    @property
    def _differentiable(self) -> list[Tensor]:
        return self._made[: len(self._made) - len(self._runner.policy.watched)]

    @torch.enable_grad()
    def _forward(self) -> None:
        body = cast(nn.Module, self._runner.model.model.base_model)
        attend = _Attention(self._runner, self._kind, self._inputs[1:])
        with self._leaves.in_place():
            made = body(inputs_embeds=self._inputs[0][None], use_cache=False, segcore_attend=[attend])
        self._made = [made.last_hidden_state[0], *attend.end()]

    def _backward(self, *, inputs_alone: bool) -> None:
        leaves = self._inputs if inputs_alone else [*self._inputs, *self._leaves.tensors]
        with self._leaves.in_place():  # layers that are checkpointed run again
            found = torch.autograd.grad(self._differentiable, leaves, self._given, retain_graph=True, allow_unused=True)
        self._found[inputs_alone] = list(found[: len(self._inputs)])
        self._sums.add(found[len(self._inputs) :])


class _Attention(RecordedAttention[Seen]):
    """Of each window its prefix's keys, rotated keys and values are given; rows of prefix and segment are made."""

    def see(
        self, window: Seen, given: tuple[Tensor, ...], q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float
    ) -> Tensor:
        rotated_q, rotated_k = self.runner.model.rope(q_HGTD.flatten(0, 1), k_HTD, window.position)
        k, rotated, v = given
        keys, values = torch.cat([rotated, rotated_k], dim=1), torch.cat([v, v_HTD], dim=1)
        if self.recording:
            self.rows += [torch.cat([k, k_HTD], dim=1), keys, values]
        return self.runner.attention(rotated_q.view(q_HGTD.shape), keys, values, scale)

    def watched(self, q_GTD: Tensor) -> Tensor:
        return q_GTD[:, -self.runner.policy.watched_tokens :]


class _Played(torch.autograd.Function):
    """A recorded pass in a graph of autograd's."""

    @staticmethod
    def forward(
        ctx: Any, recorded: Whole, inputs_alone: Callable[[], bool], tie: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.recorded, ctx.inputs_alone = recorded, inputs_alone
        ctx.set_materialize_grads(False)
        return tuple(recorded.forward(given))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, *ctx.recorded.backward(gradients, inputs_alone=ctx.inputs_alone())
