"""Whose turn it is. A turn is a chunk of one session's prefill, or one token of every session that decodes.

Decode never waits for more than one chunk, prefill never for more than `decodes_per_chunk` tokens. Within each kind
tenants take turns, and so do the sessions of each: a chunk that is ready waits for one chunk of every other tenant, and
of every other session of its own, however much they have. States live in `slots` on the device: who has work takes the
slot of one that has none, or that has held it for `slot_steps` turns.
"""

from __future__ import annotations

from collections import Counter, deque

from segcore.config import EngineConfig
from segcore.engine.request import Session, Step


class Scheduler:
    """Round robin over the sessions that have something to do."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._turns: deque[Session] = deque()
        self._decodes = 0
        self._chunks = 0
        self._served: dict[str, int] = {}  # the number of each tenant's last chunk
        self.slots: dict[str, int] = {}  # turns since each session took its slot

    def add(self, session: Session) -> None:
        self._turns.append(session)

    def remove(self, session: Session) -> None:
        self._turns.remove(session)
        self.slots.pop(session.id, None)
        if all(other.tenant != session.tenant for other in self._turns):
            self._served.pop(session.tenant, None)

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
        if not others:
            return Step.IDLE, []
        session = min(others, key=lambda s: self._served.get(s.tenant, 0))
        self._chunks += 1
        self._served[session.tenant] = self._chunks
        return steps[session.id], self._turn([session])

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
        """Give slots to the sessions that have work and none, in turn: first to tenants that have the fewest."""
        held = Counter(session.tenant for session in self._turns if session.id in self.slots)
        lacking = [s for s in self._turns if steps[s.id] is not Step.IDLE and s.id not in self.slots]
        for session in sorted(lacking, key=lambda s: held[s.tenant]):
            if len(self.slots) >= self._config.slots:
                idle = [id for id in self.slots if steps[id] is Step.IDLE]
                victim = max(idle or self.slots, key=lambda id: self.slots[id])
                if not idle and self.slots[victim] < self._config.slot_steps:
                    return
                del self.slots[victim]
            self.slots[session.id] = 0
