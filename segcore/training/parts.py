"""Short passes, over parts of a segment, as CUDA graphs: one forward, two backward.

A conversation is cut at each of its marks, and what is between two of them is some dozens of tokens: on a GPU such a
pass is nothing but launches. Passes of at most so many tokens are of one kind, padded to as many, and so are the rows
before them: a mask hides what isn't there. A segment's passes wait together for their backward passes, so what they
compute isn't kept: a backward pass runs its pass again (Chen et al. 2016, arXiv 1604.06174).

Shapes: T tokens, of which a pass may have fewer, C hidden dimension, H KV heads, G query heads per KV head, N rows
before the pass, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from segcore.engine.runner import Runner
from segcore.state import State
from segcore.training.recorder import GradientSums, RecordedAttention, Recorder
from segcore.training.shelf import Shelf

# Tokens that a pass may have.
SIZES = (128, 512)
# Kernels that take a mask want rows of it to begin at multiples.
_ALIGNED = 16


class Room(NamedTuple):
    """What a pass has room for of a window. rows: before its own. view: windows of one view have as many rows, at the
    same positions."""

    heads: tuple[int, ...]
    rows: int
    view: int


class Kind(NamedTuple):
    """tokens: that the pass has room for. windows: by layer."""

    tokens: int
    windows: tuple[tuple[Room, ...], ...]

    @property
    def views(self) -> int:
        return 1 + max(room.view for room in chain(*self.windows))


class _Place(NamedTuple):
    """Of a window before a pass. room: for so many rows. rows: that there are. position: RoPE's, of the first token."""

    room: int
    rows: int
    position: int


def part_kind(rows: list[int], state: State, tokens: int) -> Kind:
    """The kind of a pass over so many tokens. rows: that each window may have before it."""
    places = _places([-(-count // _ALIGNED) * _ALIGNED for count in rows], state)
    views, flat = _views(places), iter(places)
    windows = tuple(tuple(Room(w.heads, (p := next(flat)).room, views[p]) for w in ws) for ws in state.layers)
    return Kind(next(size for size in SIZES if tokens <= size), windows)


def _places(rooms: list[int], state: State) -> list[_Place]:
    windows = zip(rooms, chain(*state.layers), strict=True)
    return [_Place(room, w.base - w.start + state.filled, w.position + state.filled) for room, w in windows]


def _views(places: list[_Place]) -> dict[_Place, int]:
    return {place: i for i, place in enumerate(dict.fromkeys(places))}


class Part:
    """A kind of pass, and where it finds and leaves everything."""

    def __init__(
        self, runner: Runner, kind: Kind, sums: GradientSums, shelf: Shelf, embedded_TC: Tensor, like: Tensor
    ) -> None:
        """embedded_TC, like: such as passes are given, of tokens and of a window's rows."""
        self._runner, self._kind, self._sums, self._shelf, self._leaves = runner, kind, sums, shelf, sums.leaves()
        windows = list(chain(*kind.windows))
        self._rooms, self._heads = [room.rows for room in windows], [len(room.heads) for room in windows]
        self._groups = tuple(tuple(i for i, w in enumerate(windows) if w.view == view) for view in range(kind.views))
        # Of each group: rows, and the first token's position.
        self._where = torch.zeros((kind.views, 2), dtype=torch.int64, device=like.device)
        tokens, dim = kind.tokens, like.shape[-1]
        self._embedded = embedded_TC.new_zeros((tokens, embedded_TC.shape[1])).requires_grad_()
        # Rotated keys, and values, of each group.
        shapes = [(sum(self._heads[i] for i in group), self._rooms[group[0]], dim) for group in self._groups]
        self._rows = [like.new_zeros(shape).requires_grad_() for shape in shapes for _ in range(2)]
        runner.model.rope.reserve(max(self._rooms) + tokens)
        self._table = runner.model.rope.table  # graphs know it by its address
        self._made: list[Tensor] = []
        self._found: dict[bool, list[Tensor | None]] = {}
        record = Recorder(like.device)
        # Kernels that are chosen or compiled when they first run have run before it is recorded.
        with record.apart():
            self._forward()
            self._given = [torch.zeros_like(made) for made in self._differentiable(self._made)]
            self._backward(inputs_alone=False)
        self._made, self._found = [], {}
        self._play_forward = record(self._forward)
        self._play_backward = {alone: record(partial(self._backward, inputs_alone=alone)) for alone in (False, True)}
        sums.take()  # of the trial: not wanted

    def __call__(self, embedded_TC: Tensor, state: State, inputs_alone: Callable[[], bool]) -> Tensor:
        """Hidden states, [T, C]; the state's windows and queries are what they are after the pass.

        inputs_alone: asked when a backward pass comes.
        """
        where = torch.tensor([place[1:] for place in _views(_places(self._rooms, state))])
        before = self._shelf.take(state, self._groups)
        # So that a backward pass reaches the weights, whether or not it goes further.
        tie = torch.empty((), device=embedded_TC.device, requires_grad=True)
        seen = [x for rows in before for x in (rows.rotated_HND, rows.v_HND)]
        hidden_TC, *made = cast(Any, _Played).apply(self, inputs_alone, where, tie, embedded_TC, *seen)
        after = [rows.and_new(made[3 * i : 3 * i + 3]) for i, rows in enumerate(before)]
        self._shelf.put(state, self._groups, after)
        most = self._runner.policy.watched_tokens
        latest = zip(state.queries, (q_GTD.detach() for q_GTD in made[3 * len(before) :]), strict=True)
        state.queries = [torch.cat(pair, dim=1)[:, -most:].clone() for pair in latest]
        return cast(Tensor, hidden_TC)

    @torch.no_grad()
    def forward(self, where: Tensor, embedded_TC: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
        """Play the pass; what it made of the tokens that there are, and the watched cells' queries."""
        self._take(where, embedded_TC, rows)
        self._play_forward()
        return [x.clone() for x in self._of(self._made, len(embedded_TC))]

    @torch.no_grad()
    def backward(
        self,
        where: Tensor,
        embedded_TC: Tensor,
        rows: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        *,
        inputs_alone: bool,
    ) -> list[Tensor | None]:
        """Play the backward pass; gradients of the inputs."""
        self._take(where, embedded_TC, rows)
        torch._foreach_zero_(self._given)
        for mine, gradient in zip(self._of(self._given, len(embedded_TC)), gradients, strict=False):  # none for queries
            if gradient is not None:
                mine.copy_(gradient)
        self._play_backward[inputs_alone]()
        # In memory of their own: another pass of this kind may come before they are used.
        embedded, *others = self._found[inputs_alone]
        found = [None if embedded is None else embedded[: len(embedded_TC)]]
        found += [None if x is None else x[:, : y.shape[1]] for x, y in zip(others, rows, strict=True)]
        return [None if x is None else x.clone() for x in found]

    def _take(self, where: Tensor, embedded_TC: Tensor, rows: Sequence[Tensor]) -> None:
        self._where.copy_(where)
        self._embedded.detach()[: len(embedded_TC)].copy_(embedded_TC)
        for mine, given in zip(self._rows, rows, strict=True):
            mine.detach()[:, : given.shape[1]].copy_(given)

    def _of(self, made: list[Tensor], tokens: int) -> list[Tensor]:
        """Of what a pass makes of so many tokens as it has room for: hidden states, and rows."""
        hidden_TC, *rows = made
        return [hidden_TC[:tokens], *(x[:, :tokens] for x in rows)]

    def _differentiable(self, made: list[Tensor]) -> list[Tensor]:
        return made[: len(made) - len(self._runner.policy.watched)]

    def _forward(self) -> None:
        with torch.no_grad():
            self._made = self._run()

    def _backward(self, *, inputs_alone: bool) -> None:
        inputs = [self._embedded, *self._rows]
        with torch.enable_grad(), self._leaves.in_place():
            made = self._differentiable(self._run())
            leaves = inputs if inputs_alone else [*inputs, *self._leaves.tensors]
            found = torch.autograd.grad(made, leaves, self._given, allow_unused=True)
        self._found[inputs_alone] = list(found[: len(inputs)])
        self._sums.add(found[len(inputs) :])

    def _run(self) -> list[Tensor]:
        """Hidden states; new keys, rotated keys and values of each group; the watched cells' queries."""
        body = cast(nn.Module, self._runner.model.model.base_model)
        rooms = [self._rooms[group[0]] for group in self._groups]
        views = [self._view(room, *where) for room, where in zip(rooms, self._where, strict=True)]
        attend = _Attention(self._runner, self._kind, views, self._by_window())
        made = body(inputs_embeds=self._embedded[None], use_cache=False, segcore_attend=[attend])
        new = attend.end()
        rows = [torch.cat([new[3 * i + x] for i in group]) for group in self._groups for x in range(3)]
        return [made.last_hidden_state[0], *rows, *new[3 * len(self._heads) :]]

    def _by_window(self) -> list[Tensor]:
        """Rotated keys and values of each window, one window behind the other."""
        given: dict[int, tuple[Tensor, ...]] = {}
        pairs = zip(self._rows[::2], self._rows[1::2], strict=True)
        for group, pair in zip(self._groups, pairs, strict=True):
            heads = [self._heads[i] for i in group]
            given |= zip(group, zip(*(x.split(heads) for x in pair), strict=True), strict=True)
        return [x for i in range(len(given)) for x in given[i]]

    def _view(self, room: int, rows: Tensor, position: Tensor) -> _View:
        """What a window of so much room, and so many rows, is to the pass's tokens."""
        device, tokens = self._where.device, self._kind.tokens
        there_TN = (torch.arange(room, device=device) < rows).expand(tokens, room)
        earlier_TT = torch.ones((tokens, tokens), dtype=torch.bool, device=device).tril()
        seen = torch.cat([there_TN, earlier_TT], dim=1).repeat(self._runner.model.spec.queries_per_kv_head, 1)
        bias = torch.zeros(seen.shape, dtype=self._rows[0].dtype, device=device).masked_fill_(~seen, -math.inf)
        positions = position + torch.arange(tokens, device=device)
        cos, sin = (angles_ND.index_select(0, positions)[None] for angles_ND in self._table)
        return _View(bias, cos, sin)


class _View(NamedTuple):
    """bias: added to scores, [G * T, N + T]. cos, sin: of the pass's positions, as the rotation takes them."""

    bias: Tensor
    cos: Tensor
    sin: Tensor


class _Attention(RecordedAttention[Room]):
    """Of each window rotated keys and values before the pass are given; its own rows are made."""

    def __init__(self, runner: Runner, kind: Kind, views: list[_View], rows: list[Tensor]) -> None:
        super().__init__(runner, kind.windows, rows)
        self._views = views

    def see(
        self, window: Room, given: tuple[Tensor, ...], q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float
    ) -> Tensor:
        bias, cos, sin = self._views[window.view]
        q_XTD, rotated_HTD = self.runner.model.rope.turn(q_HGTD.flatten(0, 1), k_HTD, cos, sin)
        if self.recording:
            self.rows += [k_HTD, rotated_HTD, v_HTD]
        heads, group, tokens, dim = q_HGTD.shape
        # A KV head's queries are so many rows of one: its keys are read once, and not repeated.
        q = q_XTD.reshape(1, heads, group * tokens, dim)
        keys, values = (torch.cat(pair, dim=1)[None] for pair in zip(given, (rotated_HTD, v_HTD), strict=True))
        return scaled_dot_product_attention(q, keys, values, bias, scale=scale).view(q_HGTD.shape)


class _Played(torch.autograd.Function):
    """A recorded pass in a graph of autograd's."""

    @staticmethod
    def forward(
        ctx: Any,
        part: Part,
        inputs_alone: Callable[[], bool],
        where: Tensor,
        tie: Tensor,
        embedded_TC: Tensor,
        *rows: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.part, ctx.inputs_alone, ctx.where = part, inputs_alone, where
        ctx.save_for_backward(embedded_TC, *rows)
        ctx.set_materialize_grads(False)
        return tuple(part.forward(where, embedded_TC, rows))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        embedded_TC, *rows = ctx.saved_tensors
        found = ctx.part.backward(ctx.where, embedded_TC, rows, gradients, inputs_alone=ctx.inputs_alone())
        return None, None, None, None, *found
