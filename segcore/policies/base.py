"""What a policy decides: which past tokens form each cell's prefix, at which positions, and what a close keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from segcore.config import Cell, SegmentConfig
from segcore.errors import ConfigError
from segcore.model import ModelSpec, Rope
from segcore.pastkv.base import PastLayout
from segcore.pastkv.manager import SessionPast
from segcore.state import State


class Policy(ABC):
    """A rule of segmented execution. Holds no stream's state, so one serves every session of an engine."""

    name: ClassVar[str]

    def __init__(self, config: SegmentConfig, spec: ModelSpec, rope: Rope) -> None:
        self.config, self.spec, self.rope = config, spec, rope
        self.like = torch.empty(0, dtype=spec.dtype, device=spec.device)
        for cell in (*config.selectors, *(config.readers or ())):
            if not (0 <= cell.layer < spec.layers and 0 <= cell.kv_head < spec.kv_heads):
                raise ConfigError(
                    f"cell {tuple(cell)} isn't in the model: {spec.layers} layers of {spec.kv_heads} KV heads"
                )

    @property
    def watched(self) -> tuple[Cell, ...]:
        """Cells whose latest queries F keeps in `State.queries`."""
        return ()

    @property
    def layout(self) -> PastLayout | None:
        """What a closed segment leaves in past KV; None: nothing."""
        return None

    @property
    def max_stream_tokens(self) -> int | None:
        """The longest stream that the model's positions allow; None: any."""
        return None

    @abstractmethod
    def begin(self) -> State:
        """The state before a stream's first token."""

    @abstractmethod
    def close(self, state: State, past: SessionPast) -> None:
        """The open segment is full: keep what is kept, choose the next prefix, begin an empty segment. In place."""

    @abstractmethod
    def refresh(self, state: State, past: SessionPast) -> None:
        """A refresh point inside the open segment: choose the prefix anew. In place."""
