"""A state between two segments, as one row of numbers: what a gradient passes through, and what can wait elsewhere.

Shapes: n numbers of a state, H KV heads, N rows of a prefix, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from segcore.state import State, Window


def numbers(state: State) -> Tensor:
    """Its prefixes and, without a gradient, its query windows, [n]. No segment is open."""
    assert state.filled == 0
    rows = (row for window in chain.from_iterable(state.layers) for row in prefix(window))
    return torch.cat([row.reshape(-1) for row in (*rows, *(query.detach() for query in state.queries))])


def prefix(window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, rotated keys and values of its prefix, [H, N, D] each."""
    rows = window.k_HND, window.rotated_HND, window.v_HND
    if (window.start, window.base) == (0, window.k_HND.shape[1]):
        return rows  # a slice of all is a step of the backward pass for nothing
    k, rotated, v = (row[:, window.start : window.base] for row in rows)
    return k, rotated, v


@dataclass(frozen=True)
class Boundary:
    """A state's numbers, where it was or in host memory, and all else of it.

    windows: by layer, heads, rows and position of each. decided: how many choices had been taken.
    """

    numbers_n: Tensor
    windows: list[list[tuple[tuple[int, ...], int, int]]]
    queries: list[torch.Size]
    head_dim: int
    retrieved_CR: Tensor
    length: int
    events: int
    decided: int

    @classmethod
    def of(cls, state: State, decided: int) -> Boundary:
        return cls(
            numbers(state),
            [[(w.heads, w.base - w.start, w.position) for w in windows] for windows in state.layers],
            [query.shape for query in state.queries],
            state.layers[0][0].k_HND.shape[2],
            state.retrieved_CR.clone(),
            state.length,
            state.events,
            decided,
        )

    def on_host(self) -> Boundary:
        """The same, its numbers in host memory."""
        host_n = torch.empty(self.numbers_n.shape, dtype=self.numbers_n.dtype, pin_memory=self.numbers_n.is_cuda)
        return replace(self, numbers_n=host_n.copy_(self.numbers_n, non_blocking=True))

    def state(self, numbers_n: Tensor) -> State:
        """The state again, of its numbers, [n], on the model's device; windows are views of them."""
        shapes = [(len(heads), rows, self.head_dim) for heads, rows, _ in chain.from_iterable(self.windows)]
        sizes = [shape[0] * shape[1] * shape[2] for shape in shapes for _ in range(3)]
        parts = iter(numbers_n.split([*sizes, *(size.numel() for size in self.queries)]))
        views = iter([next(parts).view(shape) for shape in shapes for _ in range(3)])
        return State(
            [
                [Window(heads, next(views), next(views), next(views), 0, rows, at) for heads, rows, at in windows]
                for windows in self.windows
            ],
            [part.detach().view(size) for part, size in zip(parts, self.queries, strict=True)],
            self.retrieved_CR.clone(),
            self.length,
            events=self.events,
        )
