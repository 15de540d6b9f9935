"""The engine: sessions on one model, stepped by a thread of its own.

Callers never wait on the device: they append tokens and controls, and get futures. All public methods may be called
from any thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

import torch

from segcore.config import EngineConfig
from segcore.engine.request import Flush, Generation, Mark, Session
from segcore.engine.runner import Runner
from segcore.engine.sampler import sample
from segcore.engine.scheduler import Scheduler, step_tokens
from segcore.errors import (
    AlreadyExists,
    Busy,
    Cancelled,
    FailedPrecondition,
    LimitExceeded,
    NotFound,
    SegcoreError,
    SessionFailed,
)
from segcore.memory import engine_bytes
from segcore.model import CausalLM
from segcore.pastkv.base import PastLayout
from segcore.pastkv.manager import PastKVManager
from segcore.sampling import FinishReason

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SessionStats:
    """Counts of one session: tokens done, segments closed, tokens waiting, bytes of state on the device."""

    tokens: int
    segments: int
    pending_tokens: int
    state_bytes: int


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Memory of the engine apart from past KV, and past KV by tier; bytes."""

    sessions: int
    engine_bytes: int
    past_host_bytes: int
    past_disk_bytes: int


class Engine:
    """Runs streams of tokens through F. Start it by creating it; end it with `shutdown`."""

    def __init__(self, model: CausalLM, config: EngineConfig) -> None:
        self.config, self.spec = config, model.spec
        self._runner = Runner(model, config.segment)
        self._past = PastKVManager(config.cache)
        self._scheduler = Scheduler(config)
        self._sessions: dict[str, Session] = {}
        # Guards the fields above and every session's queue. The thread holds it to pick and to record a step, not
        # while the model runs; the session that is being stepped is `_stepping`.
        self._changed = threading.Condition()
        self._stepping: Session | None = None
        self._running = True
        self._thread = threading.Thread(target=self._loop, name="segcore-engine", daemon=True)
        self._thread.start()

    def open(self, session_id: str) -> None:
        """Begin an empty stream. Raises AlreadyExists, and Busy when `max_sessions` are open."""
        with self._changed:
            if session_id in self._sessions:
                raise AlreadyExists(f"session {session_id!r} already exists; choose another id")
            if len(self._sessions) >= self.config.max_sessions:
                raise Busy(f"all {self.config.max_sessions} sessions are in use; delete one or try later")
            past = self._past.open_stream(self._runner.policy.layout)
            session = Session(session_id, self._runner.begin(), past)
            self._sessions[session_id] = session
            self._scheduler.add(session)

    def close(self, session_id: str) -> None:
        """End a stream and free all it holds. Work under way is cancelled. Raises NotFound."""
        with self._changed:
            session = self._find(session_id)
            self._fail(session, Cancelled(f"session {session_id!r} was deleted"))
            self._changed.wait_for(lambda: self._stepping is not session)
            del self._sessions[session_id]
            self._scheduler.remove(session)
            session.past.drop()

    def append(self, session_id: str, tokens: Sequence[int]) -> None:
        """Add tokens at the stream's end; they run as soon as they fill a chunk, or at the next control.

        Raises LimitExceeded beyond the longest allowed stream; then none is added.
        """
        with self._changed:
            session = self._usable(session_id)
            limit = self.max_stream_tokens
            if session.appended + len(tokens) > limit:
                raise LimitExceeded(
                    f"the stream would be longer than {limit} tokens, the most this service runs", max_tokens=limit
                )
            session.pending.extend(tokens)
            session.appended += len(tokens)
            self._changed.notify_all()

    @property
    def max_stream_tokens(self) -> int:
        """The longest stream, by configuration and by the policy."""
        by_policy = self._runner.policy.max_stream_tokens
        return self.config.max_session_tokens if by_policy is None else min(by_policy, self.config.max_session_tokens)

    def room(self, session_id: str) -> Future[None]:
        """Done once at most `max_pending_tokens` tokens wait: the caller's back-pressure."""
        with self._changed:
            session, future = self._usable(session_id), Future[None]()
            session.waiting_for_room.append(future)
            self._release_waiting(session)
            return future

    def flush(self, session_id: str) -> Future[None]:
        """Run what waits now though it doesn't fill a chunk; done when it has run."""
        flush = Flush()
        self._control(session_id, flush)
        return flush.done

    def mark(self, session_id: str) -> None:
        """Mark an end of turn at the stream's end."""
        self._control(session_id, Mark())

    def generate(self, session_id: str, generation: Generation) -> None:
        """Answer at the stream's end. What was generated becomes part of the stream, its last token included."""
        self._control(session_id, generation)

    def abort(self, generation: Generation) -> None:
        """End an answer after the token being computed; it finishes as "aborted"."""
        generation.aborted = True

    @property
    def past_layout(self) -> PastLayout | None:
        """What a closed segment leaves in past KV; None: nothing."""
        return self._runner.policy.layout

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def session_stats(self, session_id: str) -> SessionStats:
        with self._changed:
            session = self._find(session_id)
            return SessionStats(
                tokens=session.state.length,
                segments=session.state.length // self.config.segment.segment_tokens,
                pending_tokens=len(session.pending),
                state_bytes=session.state.nbytes,
            )

    def stats(self) -> EngineStats:
        with self._changed:
            past = self._past.host_bytes
            return EngineStats(
                sessions=len(self._sessions),
                engine_bytes=engine_bytes(self.spec.device, past),
                past_host_bytes=past,
                past_disk_bytes=self._past.disk_bytes,
            )

    def shutdown(self) -> None:
        """Cancel all work, end the thread, release past KV. Idempotent."""
        with self._changed:
            self._running = False
            self._changed.notify_all()
        self._thread.join()
        for session_id in list(self._sessions):
            self.close(session_id)
        self._past.close()

    def _find(self, session_id: str) -> Session:
        if session_id not in self._sessions:
            raise NotFound(f"session {session_id!r} doesn't exist here; create it first", session=session_id)
        return self._sessions[session_id]

    def _usable(self, session_id: str) -> Session:
        session = self._find(session_id)
        if session.failure is not None:
            raise session.failure
        return session

    def _control(self, session_id: str, control: Flush | Mark | Generation) -> None:
        with self._changed:
            session = self._usable(session_id)
            if session.controls and isinstance(session.controls[-1][1], Generation):
                raise FailedPrecondition(f"session {session_id!r} is answering; wait for the answer's end")
            if isinstance(control, Generation) and session.appended == 0:
                raise FailedPrecondition(f"session {session_id!r} is empty; there is nothing to continue")
            session.controls.append((session.appended, control))
            self._changed.notify_all()

    def _loop(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    self._stepping = None
                    self._changed.notify_all()
                    session = self._scheduler.next()
                    while self._running and session is None:
                        self._changed.wait()
                        session = self._scheduler.next()
                    if not self._running or session is None:
                        return
                    self._stepping = session
                try:
                    self._step(session)
                except SegcoreError as error:
                    self._fail_step(session, error)
                except Exception:
                    log.exception("session %s failed", session.id)
                    self._fail_step(session, SegcoreError("an internal error; the service's log has it"))

    def _step(self, session: Session) -> None:
        """One forward pass, or one control."""
        control = session.due_control
        if control is None:
            self._prefill(session)
        elif isinstance(control, Generation):
            self._decode(session, control)
        else:
            if isinstance(control, Mark):
                self._runner.mark(session.state, session.past)
            with self._changed:
                if session.failure is None:
                    session.controls.popleft()
            if isinstance(control, Flush):
                _settle(control.done, None)

    def _prefill(self, session: Session) -> None:
        with self._changed:
            if session.failure is not None:
                return
            tokens = [session.pending.popleft() for _ in range(step_tokens(session, self.config))]
        self._advance(session, tokens)
        with self._changed:
            self._release_waiting(session)

    def _decode(self, session: Session, generation: Generation) -> None:
        """Sample a token, and run it unless it ends the answer; then it waits as the stream's next token."""
        assert session.logits_V is not None
        if generation.aborted:
            self._finish(session, generation, "aborted")
            return
        token = sample(session.logits_V, generation.params, generation.tokens)
        generation.tokens += 1
        stop = generation.on_token(token)
        full = session.appended + 1 >= self.max_stream_tokens
        with self._changed:
            session.appended += 1
            if stop or full or generation.tokens == generation.params.max_tokens:
                session.pending.append(token)
                self._finish(session, generation, "stop" if stop else "length")
                return
        self._advance(session, [token])
        with self._changed:
            if session.controls:
                session.controls[0] = (session.state.length, generation)

    def _finish(self, session: Session, generation: Generation, reason: FinishReason) -> None:
        with self._changed:
            if session.controls:
                session.controls.popleft()
        _settle(generation.done, reason)

    def _advance(self, session: Session, tokens: list[int]) -> None:
        logits_1V = self._runner.advance(torch.tensor(tokens), session.state, session.past)
        session.logits_V = logits_1V[-1]

    def _release_waiting(self, session: Session) -> None:
        if len(session.pending) <= self.config.max_pending_tokens:
            for future in session.waiting_for_room:
                _settle(future, None)
            session.waiting_for_room.clear()

    def _fail_step(self, session: Session, error: SegcoreError) -> None:
        with self._changed:
            failure = SessionFailed(f"session {session.id!r} ended: {error.message}", **error.details)
            self._fail(session, failure, first=error)

    def _fail(self, session: Session, failure: SegcoreError, first: SegcoreError | None = None) -> None:
        """End a session's work: whoever waits on it gets `first`, later calls `failure`. The lock is held."""
        session.failure = failure
        waiting: list[Future[Any]] = list(session.waiting_for_room)
        waiting += [control.done for _, control in session.controls if not isinstance(control, Mark)]
        session.waiting_for_room.clear()
        session.controls.clear()
        session.pending.clear()
        for future in waiting:
            _settle(future, first or failure)


def _settle(future: Future[Any], outcome: FinishReason | SegcoreError | None) -> None:
    """Finish a future that its waiter may have cancelled meanwhile."""
    try:
        if isinstance(outcome, SegcoreError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        pass
