"""A trainer's passes: whole segments and short parts of them as CUDA graphs, others as ever.

On a GPU a small model's step is launches more than arithmetic.

Shapes: T tokens, C hidden dimension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from segcore.engine.runner import Runner
from segcore.pastkv.session import SessionPast
from segcore.state import State
from segcore.training import parts, wholes
from segcore.training.parts import Part, part_kind
from segcore.training.recorder import GradientSums
from segcore.training.shelf import Shelf
from segcore.training.wholes import Whole, prefixes_of, take, whole_kind

# A kind of pass is recorded when it comes so often, of whole segments in a row: streams begin with a few that don't
# come again, and under policies that keep everything none does.
_RECORDED_AT = 3
# Of models with so many parameters a pass as long as the longest part is arithmetic rather than launches: longer passes
# run as they are, and smaller models' in parts.
_LARGE = 10**9


class Passes:
    """Runs a trainer's passes. A step begins with `forget` and ends with `collect`.

    record: whether passes may be recorded; None: on a GPU.
    """

    def __init__(self, runner: Runner, record: bool | None = None) -> None:
        self._runner = runner
        self._record = runner.model.spec.device.type == "cuda" if record is None else record
        # Rows of all windows' full prefixes; what has no bounds would be masked at great length: it runs as ever.
        layers = range(runner.model.spec.layers) if runner.config.prefix_tokens is not None else None
        self._bases = layers and [w.base for layer in layers for w in runner.policy.windows(layer)]
        self._last: tuple[wholes.Kind | None, int] = None, 0
        self._is_small = sum(p.numel() for p in runner.model.model.parameters()) < _LARGE
        self._met: Counter[parts.Kind] = Counter()
        self._wholes: dict[wholes.Kind, Whole] = {}
        self._parts: dict[parts.Kind, Part] = {}
        self._shelf = Shelf()
        self._sums: GradientSums | None = None
        self._inputs_alone = False

    def hidden(self, tokens_T: Tensor, state: State, past: SessionPast) -> Tensor:
        """As `Runner.hidden`, of one stream; [T, C]."""
        self._runner.begin_pass(tokens_T[None], [state], [past])
        return self.pass_over(tokens_T, state)

    def pass_over(self, tokens_T: Tensor, state: State) -> Tensor:
        """As `Runner.pass_over`."""
        if self._may_record:
            if (whole := self._whole_kind(state, len(tokens_T))) is not None:
                return self._play_whole(whole, tokens_T, state)
            if (part := self._part_kind(state, len(tokens_T))) is not None:
                return self._play_part(part, tokens_T, state)
        self._shelf.clear()  # rows may be written where others were: no new version tells of it
        return self._runner.pass_over(tokens_T[None], [state])[0]

    def most(self, state: State, tokens: int) -> int:
        """Of so many tokens, those of the next pass: a stream is cut alike, whatever has been recorded so far."""
        in_parts = self._record and self._is_small and self._bases is not None and not self._is_whole(state, tokens)
        return min(tokens, parts.SIZES[-1]) if in_parts else tokens

    @property
    def cut_at_marks(self) -> bool:
        """As the engine's are, to the last bit; where passes are recorded, only if something is chosen there."""
        return self._runner.config.chooses_at_marks or not self._record

    @contextmanager
    def inputs_alone(self) -> Iterator[None]:
        """Backward passes within are for what a pass was given, not for the weights."""
        self._inputs_alone = True
        try:
            yield
        finally:
            self._inputs_alone = False

    def forget(self) -> None:
        """Let go of gradients that a step which broke off has left."""
        if self._sums is not None:
            self._sums.take()

    def collect(self) -> None:
        """Add the gradients that recorded passes left to the parameters' `.grad`, as a backward pass does."""
        self._shelf.clear()
        if self._sums is not None:
            torch.autograd.backward(self._sums.parameters, self._sums.take())

    @cached_property
    def _may_record(self) -> bool:
        # Shards are gathered by hooks of each layer.
        return self._record and not any(isinstance(p, DTensor) for p in self._runner.model.model.parameters())

    def _is_whole(self, state: State, tokens: int) -> bool:
        """Over a whole segment, behind prefixes that are full if they ever are."""
        policy, whole = self._runner.policy, self._runner.config.segment_tokens
        if state.filled or tokens != whole or tokens < policy.watched_tokens:
            return False
        return self._bases is None or [w.base - w.start for w in chain(*state.layers)] == self._bases

    def _whole_kind(self, state: State, tokens: int) -> wholes.Kind | None:
        """What is to be recorded, or has been."""
        if not self._is_whole(state, tokens):
            return None
        kind = whole_kind(state)
        last, times = self._last
        self._last = kind, times + 1 if kind == last else 1
        return kind if kind in self._wholes or self._last[1] >= _RECORDED_AT else None

    def _part_kind(self, state: State, tokens: int) -> parts.Kind | None:
        if self._bases is None or tokens > parts.SIZES[-1]:
            return None
        kind = part_kind([base + self._runner.config.segment_tokens for base in self._bases], state, tokens)
        self._met[kind] += 1
        return kind if self._met[kind] >= _RECORDED_AT else None

    def _play_whole(self, kind: wholes.Kind, tokens_T: Tensor, state: State) -> Tensor:
        embedded_TC = self._embedded(tokens_T)
        if kind not in self._wholes:
            prefixes = [given.detach().clone().requires_grad_() for given in prefixes_of(state)]
            sums = self._sums_for_recording()
            self._wholes.clear()  # one at a time: each keeps a segment's activations
            self._wholes[kind] = Whole(self._runner, kind, sums, embedded_TC.detach().clone(), prefixes)
        hidden_TC, queries, rows = self._wholes[kind](embedded_TC, prefixes_of(state), lambda: self._inputs_alone)
        state.queries = [q.clone() for q in queries]
        take(state, rows)
        return hidden_TC

    def _play_part(self, kind: parts.Kind, tokens_T: Tensor, state: State) -> Tensor:
        embedded_TC = self._embedded(tokens_T)
        if kind not in self._parts:
            like = state.layers[0][0].v_HND.detach()
            sums = self._sums_for_recording()
            self._parts[kind] = Part(self._runner, kind, sums, self._shelf, embedded_TC.detach(), like)
        return self._parts[kind](embedded_TC, state, lambda: self._inputs_alone)

    def _embedded(self, tokens_T: Tensor) -> Tensor:
        """[T, C]."""
        embedding = cast(nn.Module, cast(Any, self._runner.model.model).get_input_embeddings())
        return cast(Tensor, embedding(tokens_T[None].to(self._runner.model.spec.device)))[0]

    def _sums_for_recording(self) -> GradientSums:
        """A recording begins with a trial, whose gradients nobody wants: those before it are brought to safety."""
        if self._sums is None:
            self._sums = GradientSums(self._runner.model.model)
        self.collect()
        return self._sums
