"""Whose turn it is. A turn is a chunk of one session's prefill, or one token of every session that decodes.

Decode never waits for more than one chunk, prefill never for more than `decodes_per_chunk` tokens; within each kind
sessions take turns. States live in `slots` on the device: who has work takes the slot of one that has none, or that
has held it for `slot_steps` turns.
"""

from __future__ import annotations

from collections import deque

from segcore.config import EngineConfig
from segcore.engine.request import Session, Step


class Scheduler:
    """Round robin over the sessions that have something to do."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._turns: deque[Session] = deque()
        self._decodes = 0
        self.slots: dict[str, int] = {}  # turns since each session took its slot

    def add(self, session: Session) -> None:
        self._turns.append(session)

    def remove(self, session: Session) -> None:
        self._turns.remove(session)
        self.slots.pop(session.id, None)

    @property
    def idle(self) -> bool:
        """Whether all wait."""
        return all(session.next_step(self._config) is Step.IDLE for session in self._turns)

    def next(self) -> tuple[Step, list[Session]]:
        """The sessions to step together now, and how; IDLE and none if all wait."""
        steps = {session.id: session.next_step(self._config) for session in self._turns}
        self._share_slots(steps)
        waiting = [s for s in self._turns if s.id in self.slots and steps[s.id] is not Step.IDLE]
        decoding = [s for s in waiting if steps[s.id] is Step.DECODE]
        others = [s for s in waiting if steps[s.id] is not Step.DECODE]
        if decoding and (not others or self._decodes < self._config.decodes_per_chunk):
            self._decodes += 1
            return Step.DECODE, self._turn(decoding)
        self._decodes = 0
        return (steps[others[0].id], self._turn(others[:1])) if others else (Step.IDLE, [])

    def displaced(self) -> list[Session]:
        """Sessions on the device that lost their slot: park them before anything else takes it."""
        return [s for s in self._turns if s.parked is None and s.id not in self.slots]

    def _turn(self, sessions: list[Session]) -> list[Session]:
        for session in sessions:
            self._turns.remove(session)
            self._turns.append(session)
            self.slots[session.id] += 1
        return sessions

    def _share_slots(self, steps: dict[str, Step]) -> None:
        """Give slots to the sessions that have work and none, in turn."""
        for session in self._turns:
            if steps[session.id] is Step.IDLE or session.id in self.slots:
                continue
            if len(self.slots) >= self._config.slots:
                idle = [id for id in self.slots if steps[id] is Step.IDLE]
                victim = max(idle or self.slots, key=lambda id: self.slots[id])
                if not idle and self.slots[victim] < self._config.slot_steps:
                    return
                del self.slots[victim]
            self.slots[session.id] = 0
