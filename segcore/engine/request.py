"""What an engine is asked to do, in the order of a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from segcore.config import EngineConfig
from segcore.errors import SegcoreError
from segcore.pastkv.session import SessionPast
from segcore.sampling import FinishReason, Logprobs, SamplingParams
from segcore.segments import tokens_to_next_cut
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
    """An answer. `on_token` runs on the engine's thread for each token and returns True to end the answer with it.

    logprobs: the token's, before `on_token` is called, if the parameters ask for them.
    """

    params: SamplingParams
    on_token: Callable[[int], bool]
    done: Future[FinishReason] = field(default_factory=Future)
    tokens: int = 0
    logprobs: Logprobs | None = None
    aborted: bool = False


class Step(Enum):
    """What a session would do next."""

    IDLE = "nothing"
    CONTROL = "a mark or a flush"
    PREFILL = "a pass over several tokens"
    DECODE = "a pass over one token"


@dataclass(eq=False)
class Session:
    """A stream on the engine: its state, and what waits to be run on it.

    The journal holds the tokens that were begun; `pending` those after them. A session whose state lags behind its
    journal replays it. A control at position p acts when exactly p tokens are done: it holds back the tokens after it.

    tenant: whose it is; tenants take turns. appended: tokens of the stream, done or not. parked: the state's tensors in
    host memory, while the session has no slot on the device.
    """

    id: str
    past: SessionPast
    state: State
    tenant: str = ""
    appended: int = 0
    pending: deque[int] = field(default_factory=deque)
    controls: deque[tuple[int, Flush | Mark | Generation]] = field(default_factory=deque)
    waiting_for_room: list[Future[None]] = field(default_factory=list)
    logits_V: Tensor | None = None
    parked: dict[str, Tensor] | None = None
    failure: SegcoreError | None = None
    recoveries: int = 0

    @property
    def replayed_event(self) -> int | None:
        """The journal's next event, if the state lags behind it."""
        return self.past.journal.next_event(self.state)

    @property
    def due_control(self) -> Flush | Mark | Generation | None:
        """The control that acts now, if any."""
        if self.controls and self.replayed_event is None and self.controls[0][0] == self.state.length:
            return self.controls[0][1]
        return None

    def next_pass(self, config: EngineConfig) -> int:
        """How many tokens the next forward pass takes; 0 if it must wait for more, or for a control.

        A pass ends at a cut, or at a control that asks for what is there: both are functions of the stream alone.
        """
        event = self.replayed_event
        if event is not None:
            return max(event - self.state.length, 0)
        cut = tokens_to_next_cut(self.state.filled, config.segment, config.chunk_tokens)
        ready = self.ready_tokens
        return min(ready, cut) if self.controls else cut if ready >= cut else 0

    @property
    def ready_tokens(self) -> int:
        """Pending tokens that no control holds back."""
        limit = self.controls[0][0] if self.controls else self.appended
        return limit - len(self.past.journal.tokens)

    def next_step(self, config: EngineConfig) -> Step:
        """What would be done next."""
        if self.failure is not None:
            return Step.IDLE
        control = self.due_control
        if isinstance(control, Generation):
            return Step.DECODE
        event = self.replayed_event
        if control is not None or (event is not None and event < 0):
            return Step.CONTROL
        tokens = self.next_pass(config)
        return Step.IDLE if tokens == 0 else Step.DECODE if tokens == 1 else Step.PREFILL
