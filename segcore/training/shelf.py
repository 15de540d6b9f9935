"""Rows of windows that are alike, together: a launch for each window would be most of what a short pass takes.

Shapes: T tokens, H KV heads of all windows of a group, one window behind the other, N rows, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from segcore.state import State, Window

# Windows by their numbers in a state, those that are alike together.
Groups = tuple[tuple[int, ...], ...]


class Rows(NamedTuple):
    """What a group's windows hold, [H, N, D] each."""

    k_HND: Tensor
    rotated_HND: Tensor
    v_HND: Tensor

    def before(self, rows: int) -> Rows:
        return self if rows == self.k_HND.shape[1] else Rows(*(x[:, :rows] for x in self))

    def and_new(self, rows: Sequence[Tensor]) -> Rows:
        return Rows(*(torch.cat(pair, dim=1) for pair in zip(self, rows, strict=True)))


class Shelf:
    """The windows of a state between two short passes of a segment."""

    def __init__(self) -> None:
        self._version = -1
        self._groups: Groups = ()
        self._rows: list[Rows] = []

    def clear(self) -> None:
        """What is here isn't wanted any more, or may not be what the windows hold."""
        self._version, self._rows = -1, []

    def take(self, state: State, groups: Groups) -> list[Rows]:
        """Of each group all rows, prefixes and the open segment."""
        windows = list(chain(*state.layers))
        if (state.version, groups) == (self._version, self._groups):
            count = [windows[first].base + state.filled for first, *_ in groups]
            return [rows.before(n) for rows, n in zip(self._rows, count, strict=True)]
        each = [Rows(*w.rows(w.start, w.base - w.start + state.filled)) for w in windows]
        return [Rows(*map(torch.cat, zip(*(each[i] for i in group), strict=True))) for group in groups]

    def put(self, state: State, groups: Groups, rows: list[Rows]) -> None:
        """Let the windows of `state` be views of these."""
        windows = list(chain(*state.layers))
        for group, mine in zip(groups, rows, strict=True):
            heads = [len(windows[i].heads) for i in group]
            for i, k, rotated, v in zip(group, *(x.split(heads) for x in mine), strict=True):
                w = windows[i]
                windows[i] = Window(w.heads, k, rotated, v, 0, w.base - w.start, w.position)
        after = iter(windows)
        state.layers = [[next(after) for _ in layer] for layer in state.layers]
        state.moved()
        self._version, self._groups, self._rows = state.version, groups, rows
