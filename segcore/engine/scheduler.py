"""Whose turn it is: sessions take turns, one step each; a step is a chunk of prefill or one token of an answer."""

from __future__ import annotations

from collections import deque

from segcore.config import EngineConfig
from segcore.engine.request import Session
from segcore.segments import tokens_to_next_cut


def step_tokens(session: Session, config: EngineConfig) -> int:
    """How many pending tokens the session's next forward pass takes; 0 if it must wait for more.

    A pass ends at a cut, or at a control that asks for what is there: both are functions of the stream alone.
    """
    cut = tokens_to_next_cut(session.state.filled, config.segment, config.chunk_tokens)
    ready = session.ready_tokens
    return min(ready, cut) if session.controls else cut if ready >= cut else 0


class Scheduler:
    """Round robin over the sessions that have something to do."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._turns: deque[Session] = deque()

    def add(self, session: Session) -> None:
        self._turns.append(session)

    def remove(self, session: Session) -> None:
        self._turns.remove(session)

    def next(self) -> Session | None:
        """The session to step now; None if all wait."""
        for _ in range(len(self._turns)):
            session = self._turns[0]
            self._turns.rotate(-1)
            if session.failure is None and (session.due_control or step_tokens(session, self._config)):
                return session
        return None
