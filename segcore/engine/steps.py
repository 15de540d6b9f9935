"""The engine's steps: what its thread does for the sessions whose turn it is.

Everything here runs on the engine's thread. `changed` guards what other threads see of a session; it isn't held while
the model runs.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from segcore.config import EngineConfig
from segcore.engine.request import Flush, Generation, Mark, Session, Step
from segcore.engine.runner import Runner
from segcore.engine.sampler import logprobs, sample
from segcore.engine.snapshot import pack, unpack
from segcore.engine.speed import Speed
from segcore.errors import LimitExceeded, PastKVError, SegcoreError, SessionFailed, StorageFull
from segcore.memory import is_out_of_memory
from segcore.pastkv.session import SessionPast
from segcore.sampling import FinishReason
from segcore.segments import tokens_to_next_cut
from segcore.state import State

log = logging.getLogger(__name__)

# Past KV that is lost again each time it was made again can't be helped.
MAX_RECOVERIES = 8


class Steps:
    """Carries out turns: passes, controls, and what it takes to begin them and to recover from lost past KV."""

    def __init__(self, runner: Runner, config: EngineConfig, max_tokens: int, changed: threading.Condition) -> None:
        self._runner, self._config, self._max_tokens, self._changed = runner, config, max_tokens, changed
        self.counts: Counter[str] = Counter()  # what was done, by kind
        self._speed = Speed(runner.model.spec.device)

    def run(self, step: Step, sessions: list[Session]) -> None:
        """One turn. What goes wrong in one session ends that session alone, if anything."""
        sessions = [session for session in sessions if self._guarded(session, partial(self._unpark, session))]
        if not sessions:
            return
        if step is Step.CONTROL:
            self._guarded(sessions[0], partial(self._control, sessions[0]))
        elif step is Step.PREFILL:
            self._prefill(sessions[0])
        else:
            self._decode(sessions)

    def park(self, session: Session) -> None:
        """Move a session's state to host memory."""
        if session.parked is None:
            session.parked = pack(session.state)
            session.state.layers, session.state.queries = [], []

    def fail(self, session: Session, failure: SegcoreError, first: SegcoreError | None = None) -> None:
        """End a session's work: whoever waits on it gets `first`, later calls `failure`."""
        with self._changed:
            session.failure = failure
            for_room, session.waiting_for_room = session.waiting_for_room, []
        self.forget_waiting(session, first or failure)
        for future in for_room:
            settle(future, first or failure)

    def forget_waiting(self, session: Session, error: SegcoreError) -> None:
        """Drop the tokens and controls that haven't been run; whoever waits on them gets `error`."""
        with self._changed:
            controls = [control for _, control in session.controls]
            session.controls.clear()
            session.pending.clear()
        for control in controls:
            if not isinstance(control, Mark):
                settle(control.done, error)

    def release_waiting(self, session: Session) -> None:
        """Let those go on who wait for room."""
        with self._changed:
            limit = self._config.max_pending_tokens or self._config.segment.segment_tokens
            if len(session.pending) <= limit:
                for future in session.waiting_for_room:
                    settle(future, None)
                session.waiting_for_room.clear()

    def _unpark(self, session: Session) -> bool:
        if session.parked is not None:
            session.state, session.parked = unpack(session.parked, self._runner.policy), None
        return True

    def _control(self, session: Session) -> None:
        if session.replayed_event is not None:
            self._runner.mark(session.state, session.past)
            return
        with self._changed:
            control = session.due_control
            if control is None:  # the session failed meanwhile
                return
            session.controls.popleft()
        if isinstance(control, Mark):
            self._runner.mark(session.state, session.past)
        elif isinstance(control, Flush):
            settle(control.done, None)

    def _prefill(self, session: Session) -> None:
        if not self._guarded(session, partial(self._adopt, session)):
            self._pass([session], [self._take(session)])
        self.release_waiting(session)

    def _decode(self, sessions: list[Session]) -> None:
        """A token of each: sampled, or the one that waits or is replayed."""
        self._pass(sessions, [self._guarded(session, partial(self._next_token, session)) or [] for session in sessions])
        for session in sessions:
            self.release_waiting(session)

    def _next_token(self, session: Session) -> list[int]:
        """The token to run, if any."""
        control = session.due_control
        if isinstance(control, Generation):
            return self._sample(session, control)
        at_boundary = session.replayed_event is not None and session.state.filled == 0
        return [] if at_boundary and self._adopt(session) else self._take(session)

    def _take(self, session: Session) -> list[int]:
        """The tokens of the next pass, replayed or new; none if the session failed meanwhile."""
        with self._changed:
            if session.failure is not None:
                return []
            count = session.next_pass(self._config)
            if session.replayed_event is not None:
                return session.past.journal.tokens_to(session.state, session.state.length + count)
            return [session.pending.popleft() for _ in range(count)]

    def _sample(self, session: Session, generation: Generation) -> list[int]:
        """The answer's next token, if it must be run; the last one waits as the stream's next token instead."""
        assert session.logits_V is not None
        with self._changed:
            full = session.appended >= self._max_tokens
            if generation.aborted or full:
                self._finish(session, generation, "aborted" if generation.aborted else "length")
                return []
            session.appended += 1
        token = sample(session.logits_V, generation.params, generation.tokens)
        generation.tokens += 1
        if generation.params.logprobs is not None:
            generation.logprobs = logprobs(session.logits_V, token, generation.params.logprobs)
        stop = generation.on_token(token)
        with self._changed:
            full = session.appended >= self._max_tokens
            if stop or full or generation.tokens == generation.params.max_tokens:
                session.pending.appendleft(token)  # what was appended meanwhile comes after it
                self._finish(session, generation, "stop" if stop else "length")
                return []
            if session.controls:
                # The answer goes on where this token ends, even if its pass has to be run again.
                session.controls[0] = (len(session.past.journal.tokens) + 1, generation)
        return [token]

    def _finish(self, session: Session, generation: Generation, reason: FinishReason) -> None:
        with self._changed:
            if session.controls:
                session.controls.popleft()
        settle(generation.done, reason)

    def _pass(self, sessions: list[Session], rows: list[list[int]]) -> None:
        """One forward pass over equally many tokens of each session that has some."""
        running = [(session, row) for session, row in zip(sessions, rows, strict=True) if row]
        if not running:
            return
        tokens_BT = torch.tensor([row for _, row in running])
        count = tokens_BT.shape[1]
        states, pasts = [s.state for s, _ in running], [s.past for s, _ in running]
        try:
            with self._speed.measured(count) if count > 1 else nullcontext():
                logits_B1V = self._runner.forward(
                    tokens_BT, states, pasts, width=self._config.slots if count == 1 else 1
                )
        except Exception as error:
            for session, _ in running:
                self._end(session, error)
            return
        for (session, _), logits_1V in zip(running, logits_B1V, strict=True):
            self._arrive(session, count, logits_1V[-1].clone())

    def _arrive(self, session: Session, count: int, logits_V: Tensor) -> None:
        session.logits_V = logits_V
        self.counts["tokens.prefill" if count > 1 else "tokens.decode"] += count
        self.counts["segments.run"] += session.state.filled == 0
        self._guarded(session, partial(self._runner.arrive, session.state, session.past, count, logits_V))
        if session.replayed_event is None:
            session.recoveries = 0

    def _guarded(self, session: Session, act: Callable[[], Any]) -> Any:
        """Do something for a session; lost past KV is made again, other errors end the session."""
        try:
            return act()
        except StorageFull as error:
            self._end(session, error)
        except PastKVError as error:
            self._recover(session, error)
        except Exception as error:
            self._end(session, error)
        return None

    def _end(self, session: Session, error: Exception) -> None:
        if is_out_of_memory(error):
            error = LimitExceeded(f"memory for this session is used up: {error}")
        if not isinstance(error, SegcoreError):
            log.error("session %s failed", session.id, exc_info=error)
            error = SegcoreError("an internal error; the service's log has it")
        failure = SessionFailed(f"session {session.id!r} ended: {error.message}", **error.details)
        self.fail(session, failure, first=error)

    def _recover(self, session: Session, error: PastKVError) -> None:
        """Past KV was lost: go back to the last boundary that stands, and replay the journal from there."""
        session.recoveries += 1
        self.counts["recoveries"] += 1
        if session.recoveries > MAX_RECOVERIES:
            self._end(session, error)
            return
        log.warning("session %s: %s; running its tokens again", session.id, error.message)
        lost = int(error.details.get("segment", session.past.segments))
        try:
            session.state, session.logits_V = self.resume(session, lost)
        except Exception as failure:
            self._end(session, failure)

    @torch.inference_mode()
    def resume(self, session: Session, at_most: int) -> tuple[State, Tensor | None]:
        """The state at the last boundary whose past KV stands, of at most so many segments, and its logits.

        Lets go of all blocks after it.
        """
        past = session.past
        past.truncate(min(past.intact(), at_most))
        while past.segments:
            try:
                boundary = past.boundary()
                if boundary:
                    return self._runner.resume(boundary, past)
                past.truncate(past.segments - 1)
            except PastKVError as error:
                log.warning("session %s: %s", session.id, error.message)
                past.truncate(min(past.segments - 1, int(error.details.get("segment", past.segments))))
        return self._runner.begin(), None

    def _adopt(self, session: Session) -> bool:
        """Skip the segments that another stream, or this one before, has run already; whether there were any."""
        if self._runner.policy.layout is None:
            return False
        past, boundary = session.past, None
        before = resumable = past.segments
        while (following := self._following(session)) is not None:
            key, tokens, ends = following
            if not self.restores(past, key):
                break
            adopted = past.adopt(key)
            if adopted:
                boundary, resumable = adopted, past.segments
            past.journal.extend(tokens, ends)
            with self._changed:
                if session.failure is None:  # else nothing is pending any more
                    for _ in tokens:
                        session.pending.popleft()
        # What lies behind the last boundary is in the journal now, and is run again.
        past.truncate(resumable)
        if boundary is None:
            return False
        self.counts["segments.adopted"] += resumable - before
        session.state, session.logits_V = self._runner.resume(boundary, past)
        return True

    def restores(self, past: SessionPast, key: str) -> bool:
        """Whether a block is there, and is taken up no slower than its segment is run, as far as both are known."""
        restore_s, run_s = past.restore_seconds(key), self._speed.seconds(self._config.segment.segment_tokens)
        if restore_s is None:
            return False
        if run_s is not None and restore_s > run_s:
            log.info("a segment is run again in %.3f s, for restoring it takes %.3f s", run_s, restore_s)
            return False
        return True

    def _following(self, session: Session) -> tuple[str, list[int], list[int]] | None:
        """The segment after the last closed one, if all of it is known: its key, and what the journal lacks of it.

        What is pending is taken to run in the passes in which it would, if nothing intervenes.
        """
        past, journal, segment = session.past, session.past.journal, self._config.segment
        first = past.segments * segment.segment_tokens
        stop, known = first + segment.segment_tokens, len(journal.tokens)
        if known >= stop:
            return journal.key(past.last_key, first, stop), [], []
        with self._changed:
            if session.failure is not None or session.ready_tokens < stop - known:
                return None
            tokens = list(itertools.islice(session.pending, stop - known))
        ends, filled = [], known - first
        while filled < segment.segment_tokens:
            filled += tokens_to_next_cut(filled, segment, self._config.chunk_tokens)
            ends.append(first + filled)
        return journal.key(past.last_key, first, stop, tokens, ends), tokens, ends


def settle(future: Future[Any], outcome: FinishReason | SegcoreError | None) -> None:
    """Finish a future that its waiter may have cancelled meanwhile."""
    try:
        if isinstance(outcome, SegcoreError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        pass
