"""What an engine is asked to do, in the order of a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from segcore.errors import SegcoreError
from segcore.pastkv.manager import SessionPast
from segcore.sampling import FinishReason, SamplingParams
from segcore.state import State


@dataclass
class Flush:
    """Run all tokens before this point, though they don't fill a chunk."""

    done: Future[None] = field(default_factory=Future)


@dataclass
class Mark:
    """An end of turn: a refresh point."""


@dataclass
class Generation:
    """An answer. `on_token` runs on the engine's thread for each token and returns True to end the answer with it."""

    params: SamplingParams
    on_token: Callable[[int], bool]
    done: Future[FinishReason] = field(default_factory=Future)
    tokens: int = 0
    aborted: bool = False


@dataclass
class Session:
    """A stream on the engine: its state, and what waits to be run on it.

    Tokens [0, state.length) are done, [state.length, appended) wait in `pending`. A control at position p acts when
    exactly p tokens are done: it holds back the tokens after it.
    """

    id: str
    state: State
    past: SessionPast
    appended: int = 0
    pending: deque[int] = field(default_factory=deque)
    controls: deque[tuple[int, Flush | Mark | Generation]] = field(default_factory=deque)
    waiting_for_room: list[Future[None]] = field(default_factory=list)
    logits_V: Tensor | None = None
    failure: SegcoreError | None = None

    @property
    def ready_tokens(self) -> int:
        """Pending tokens that no control holds back."""
        limit = self.controls[0][0] if self.controls else self.appended
        return limit - self.state.length

    @property
    def due_control(self) -> Flush | Mark | Generation | None:
        """The control that acts now, if any."""
        if self.controls and self.controls[0][0] == self.state.length:
            return self.controls[0][1]
        return None
