"""What a policy decides: which past tokens form each cell's prefix, at which positions, and what a close keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from segcore.config import Cell, SegmentConfig
from segcore.errors import ConfigError
from segcore.model import ModelSpec, Rope
from segcore.pastkv.base import PastLayout
from segcore.pastkv.session import SessionPast
from segcore.retrieval.recall import Recall
from segcore.state import State, Window

C = TypeVar("C", bound=SegmentConfig)


class Policy(ABC, Generic[C]):
    """A rule of segmented execution. Holds no stream's state, so one serves every session of an engine.

    original_positions: a token keeps its position in the stream; else positions are those within prefix and segment.
    bounded: a session's bytes on the device don't grow with its stream. recall: of what is chosen by an index that can
    miss.
    """

    original_positions: ClassVar[bool] = False
    bounded: ClassVar[bool] = True

    def __init__(self, config: C, spec: ModelSpec, rope: Rope) -> None:
        self.config, self.spec, self.rope = config, spec, rope
        self.like = torch.empty(0, dtype=spec.dtype, device=spec.device)
        self.recall = Recall()

    @property
    def watched(self) -> tuple[Cell, ...]:
        """Cells whose latest queries F keeps in `State.queries`."""
        return ()

    @property
    def watched_tokens(self) -> int:
        """How many of their latest queries."""
        return 0

    @property
    def layout(self) -> PastLayout | None:
        """What a closed segment leaves in past KV; None: nothing."""
        return None

    @property
    def max_stream_tokens(self) -> int | None:
        """The longest stream that the model's positions allow; None: any."""
        return self.spec.max_positions if self.original_positions else None

    def begin(self) -> State:
        """The state before a stream's first token."""
        no_queries = self.like.new_empty((self.spec.queries_per_kv_head, 0, self.spec.head_dim))
        layers = [self.windows(layer) for layer in range(self.spec.layers)]
        return State(layers, queries=[no_queries] * len(self.watched))

    @abstractmethod
    def windows(self, layer: int) -> list[Window]:
        """A layer's empty windows."""

    @abstractmethod
    def close(self, state: State, past: SessionPast) -> None:
        """The open segment is full: keep what is kept, choose the next prefix, begin an empty segment. In place."""

    def refresh(self, state: State, past: SessionPast) -> None:
        """A refresh point inside the open segment: choose the prefix anew, if this policy chooses. In place."""

    def prefetch(self, state: State, past: SessionPast) -> None:
        """A refresh point comes with the next pass: let what it may need be read meanwhile."""

    def boundary(self, state: State) -> dict[str, Tensor]:
        """What `resume` needs beside past KV to go on after this close. Only asked of policies with a layout."""
        raise NotImplementedError

    def resume(self, boundary: dict[str, Tensor], past: SessionPast) -> State:
        """The state after the last close of `past`, from its past KV and `boundary`."""
        raise NotImplementedError

    def _window(
        self, heads: Iterable[int], *, prefix: int = 0, position: int = 0, segment: int | None = None
    ) -> Window:
        """segment: rows of the open segment that there is room for at first; None: all."""
        segment = self.config.segment_tokens if segment is None else segment
        return Window.allocate(
            tuple(heads), self.like, self.spec.head_dim, segment=segment, prefix=prefix, position=position
        )

    def _split(self, layer: int, chosen: Iterable[Cell]) -> tuple[list[int], list[int]]:
        """The KV heads of a layer, ascending: those whose cell is chosen, and the others."""
        heads, cells = range(self.spec.kv_heads), set(chosen)
        return [h for h in heads if Cell(layer, h) in cells], [h for h in heads if Cell(layer, h) not in cells]

    def _require_cells(self, cells: Iterable[Cell]) -> None:
        for cell in cells:
            if not (0 <= cell.layer < self.spec.layers and 0 <= cell.kv_head < self.spec.kv_heads):
                raise ConfigError(
                    f"cell {tuple(cell)} isn't in the model: {self.spec.layers} layers of {self.spec.kv_heads} KV heads"
                )

    def _require_positions(self, needed: int) -> None:
        if needed > self.spec.max_positions:
            raise ConfigError(
                f"prefix and segment take {needed} positions, and {self.spec.architecture} was trained on"
                f" {self.spec.max_positions}; lower segment_tokens"
            )


def sinks_and_tail(closed: int, sink_tokens: int, tail_tokens: int) -> tuple[int, int]:
    """How many sinks and tail tokens a cell holds after `closed` tokens; no token is both."""
    sinks = min(sink_tokens, closed)
    return sinks, min(tail_tokens, closed - sinks)


def segment_ends(window: Window, state: State, sink_tokens: int, tail_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values, [H, N, D] each, of the stream's first and last tokens, from a full segment's window."""
    sinks, tail = sinks_and_tail(state.length, sink_tokens, tail_tokens)
    # In the first segment the sinks stand at its head; later they lead the prefix.
    sink_row = window.base if state.closed == 0 else window.start
    stop = window.base + state.filled
    return window.between((sink_row, sink_row + sinks), (stop - tail, stop))


def write_prefixes(prefixes: Sequence[tuple[Window, Tensor, Tensor]], rope: Rope, *, filled: int = 0) -> None:
    """Right-align prefixes, keys and values [H, N, D] each, before their segments, keys rotated to just before it.

    filled: tokens of the open segment, which stay.
    """
    # On a GPU all alike at once, for each is too little work; on a CPU each while it is in the cache.
    batches: dict[object, list[tuple[Window, Tensor, Tensor]]] = {}
    for window, k_HND, v_HND in prefixes:
        alike = (k_HND.shape[1], window.position) if k_HND.is_cuda else id(window)
        batches.setdefault(alike, []).append((window, k_HND, v_HND))
    for batch in batches.values():
        first, some_HND, _ = batch[0]
        rows = some_HND.shape[1]
        rotated = rope.keys(torch.cat([k_HND for _, k_HND, _ in batch]), first.position - rows)
        parts = rotated.split([len(window.heads) for window, _, _ in batch])
        for (window, k_HND, v_HND), rotated_HND in zip(batch, parts, strict=True):
            window.become(k_HND, rotated_HND, v_HND, filled)
