"""The engine: sessions on one model, stepped by a thread of its own.

Callers never wait on the device: they append tokens and controls, and get futures. All public methods may be called
from any thread.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass

import torch

from segcore.config import EngineConfig
from segcore.engine.replay import block_keys, journal_of
from segcore.engine.request import Flush, Generation, Mark, Session, Step
from segcore.engine.runner import Runner
from segcore.engine.scheduler import Scheduler
from segcore.engine.snapshot import Snapshot, counted, pack
from segcore.engine.steps import Steps, settle
from segcore.errors import (
    AlreadyExists,
    BlockMismatch,
    Busy,
    Cancelled,
    FailedPrecondition,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PastKVError,
    SegcoreError,
)
from segcore.fingerprint import Fingerprint, segment_json, weights_digest
from segcore.memory import engine_bytes
from segcore.model import CausalLM
from segcore.pastkv.base import PastLayout
from segcore.pastkv.format import Cipher
from segcore.pastkv.manager import PastKVManager
from segcore.pastkv.session import SessionPast
from segcore.state import State
from segcore.threads import apart

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SessionStats:
    """Counts of one session: tokens done, segments closed, tokens waiting, bytes of state on the device.

    failed: an error ended it.
    """

    tokens: int
    segments: int
    pending_tokens: int
    state_bytes: int
    failed: bool


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Memory of the engine apart from past KV, and past KV by tier, in bytes; what went wrong in tiers, by kind.

    slots: states on the device. working_sessions: have something to do; queued_sessions: those of them without a slot;
    queued_tokens: theirs that wait to be run, of streams that are taken up again, too. counts: of what was done since
    the start: "tokens.prefill", "tokens.decode", "segments.run", "segments.adopted", "restored.found",
    "restored.lost", "restored.recomputed" (segments of streams that were taken up again: past KV was there, wasn't, or
    was slower to have than to make), "recoveries", "index.chosen", "index.found" (tokens that the oracle chose in
    searches that were looked at, and those of them that the index found).
    """

    sessions: int
    engine_bytes: int
    past_bytes: dict[str, int]
    faults: dict[str, int]
    slots: int
    working_sessions: int
    queued_sessions: int
    queued_tokens: int
    counts: dict[str, int]


class Engine:
    """Runs streams of tokens through F. Start it by creating it; end it with `shutdown`.

    cipher: encrypts past KV outside of memory.
    """

    def __init__(self, model: CausalLM, config: EngineConfig, cipher: Cipher | None = None) -> None:
        self.config, self.spec = config, model.spec
        if model.spec.device.type == "cuda" if config.compile is None else config.compile:
            model.compile()
        self._runner = apart(lambda: Runner(model, config.segment, config.attention))
        self.fingerprint = Fingerprint(
            model=config.model,
            weights=apart(lambda: weights_digest(*model.modules)),
            tokenizer=config.tokenizer,
            adapter=config.adapter,
            dtype=str(model.spec.dtype),
            segment=segment_json(config.segment),
        )
        self._past = PastKVManager(config.cache, self.fingerprint, model.spec.device, cipher)
        self._scheduler = Scheduler(config)
        self._sessions: dict[str, Session] = {}
        self._blank = apart(lambda: pack(self._runner.begin()))
        # Guards the fields above and what other threads see of a session. The thread holds it to pick a turn, not
        # while the model runs; the sessions whose turn it is are `_stepping`.
        self._changed = threading.Condition()
        self._steps = Steps(self._runner, config, self.max_stream_tokens, self._changed)
        self._stepping: list[Session] = []
        self._interrupting = 0  # callers who wait for the turn's end: they go before the next turn
        self._running = True
        self._thread = threading.Thread(target=self._loop, name="segcore-engine", daemon=True)
        self._thread.start()

    def open(self, session_id: str, *, tenant: str = "") -> None:
        """Begin an empty stream. Streams of one tenant that begin alike share past KV; those of others never do.

        Raises AlreadyExists, and Busy when `max_sessions` are open.
        """
        with self._changed:
            self._check_new(session_id)
            past = self._past.open_stream(self._runner.policy.layout, tenant)
            self._add(Session(session_id, past, State([]), tenant, parked=self._blank))

    def close(self, session_id: str) -> None:
        """End a stream and let go of all it holds. Work under way is cancelled. Raises NotFound."""
        with self._changed:
            session = self._find(session_id)
            self._steps.fail(session, Cancelled(f"session {session_id!r} was deleted"))
            self._changed.wait_for(lambda: session not in self._stepping)
            if self._sessions.pop(session_id, None) is not None:  # another thread may have been first
                self._scheduler.remove(session)
                session.past.truncate(0)

    def append(self, session_id: str, tokens: Sequence[int]) -> None:
        """Add tokens at the stream's end; they run as soon as they fill a chunk, or at the next control.

        Raises LimitExceeded beyond the longest allowed stream, and InvalidRequest for a token that the model doesn't
        have; then none is added.
        """
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.spec.vocabulary:
            raise InvalidRequest(
                f"tokens must lie between 0 and {self.spec.vocabulary - 1}, the model's vocabulary, not"
                f" {min(tokens)} to {max(tokens)}"
            )
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
            self._steps.release_waiting(session)
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
        """End an answer after the token being computed, or before its first one; it finishes as "aborted"."""
        generation.aborted = True
        with self._changed:
            self._changed.notify_all()

    def fork(self, session_id: str, new_id: str) -> None:
        """A second stream that continues from where this one stands; past KV is shared, not copied.

        So is a parked state until one of them runs.

        An answer under way isn't continued in the fork. Raises NotFound, SessionFailed, AlreadyExists, Busy.
        """
        with self._changed:
            session = self._at_rest(session_id)
            self._check_new(new_id)
            self._continue(new_id, self._snapshot(session), session.past.fork(), session.tenant)

    def snapshot(self, session_id: str) -> bytes:
        """The session as bytes, for `restore` here or in another process. Blocks of past KV aren't in it: they are
        found by their keys, or made again from the tokens. An answer under way isn't continued."""
        with self._changed:
            return self._snapshot(self._at_rest(session_id)).to_bytes(self.fingerprint)

    def restore(self, session_id: str, data: bytes, *, tenant: str = "") -> None:
        """Open a session that continues a snapshot, as if it had never stopped.

        Raises BlockMismatch if it was taken of another model, configuration or tenant, BlockDamaged if its tokens are
        damaged; whatever else is damaged or missing is made again from them.
        """
        snapshot = Snapshot.from_bytes(data, self.fingerprint)
        with self._changed:
            self._check_new(session_id)
            past = self._past.open_stream(self._runner.policy.layout, tenant)
            if past.root != snapshot.root:
                raise BlockMismatch("the snapshot is another tenant's", fields="tenant")
            past.journal = snapshot.journal
            self._continue(session_id, snapshot, past, tenant)

    def replay(self, session_id: str, tokens: Sequence[int], stops: Sequence[int], *, tenant: str = "") -> None:
        """Open a session that continues a stream of which nothing is left but its tokens; stops: see `journal_of`.

        Blocks that stand anywhere are taken up; what lacks is run again, in the same passes. An answer that had `n`
        tokens goes on with `generate` of a generation whose `tokens` is n. Raises AlreadyExists, Busy.
        """
        with self._changed:
            self._check_new(session_id)
            past = self._past.open_stream(self._runner.policy.layout, tenant)
        past.journal = journal = journal_of(tokens, stops, self.config)
        size = self.config.segment.segment_tokens
        keys = [] if self.past_layout is None else block_keys(journal, past.root, size)
        rest = deque(tokens[len(journal.tokens) :])
        # Tiers may be slow, so the engine goes on meanwhile.
        snapshot = Snapshot(past.root, journal, tuple(keys), rest, (), None)
        session = self._continued(session_id, snapshot, past, tenant)
        with self._changed:
            try:
                self._check_new(session_id)
            except SegcoreError:
                past.truncate(0)
                raise
            self._steps.counts["restored.found"] += past.segments
            slow = past.segments < len(keys) and past.restore_seconds(keys[past.segments]) is not None
            self._steps.counts["restored.recomputed" if slow else "restored.lost"] += len(keys) - past.segments
            self._add(session)

    def rewind(self, session_id: str, tokens: int) -> None:
        """Go back to where the stream had `tokens` tokens, the end of a closed segment or 0; forget what came after.

        A flush that waits is cancelled. Raises InvalidRequest for a position that isn't such an end, FailedPrecondition
        while the session answers.
        """
        with self._changed:
            session = self._at_rest(session_id)
            if any(isinstance(control, Generation) for _, control in session.controls):
                raise FailedPrecondition(f"session {session_id!r} is answering; wait for the answer's end")
            size = self.config.segment.segment_tokens
            closed = len(session.past.journal.tokens) // size * size  # the state may lag behind
            if tokens % size or not 0 <= tokens <= closed:
                raise InvalidRequest(
                    f"a stream can go back to the end of a closed segment: a multiple of {size} up to {closed}, not"
                    f" {tokens}"
                )
            session.past.journal.truncate(tokens)
            session.appended = tokens
            self._steps.forget_waiting(session, Cancelled(f"session {session_id!r} went back to token {tokens}"))
            self._steps.release_waiting(session)
            state, session.logits_V = apart(lambda: self._steps.resume(session, tokens // size))
            self._place(session, state)

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
                pending_tokens=session.appended - session.state.length,
                state_bytes=session.state.nbytes,
                failed=session.failure is not None,
            )

    def retrieved(self, session_id: str) -> list[int]:
        """Positions in the stream of what was last retrieved, for any reader, ascending."""
        with self._changed:
            session = self._at_rest(session_id)
            rows = session.state.retrieved_CR if session.parked is None else session.parked["retrieved"]
            return sorted(set(rows.flatten().tolist()))

    def stats(self) -> EngineStats:
        with self._changed:
            past, slots = self._past.used_bytes, self._scheduler.slots
            working = self._at_work()
            return EngineStats(
                sessions=len(self._sessions),
                engine_bytes=engine_bytes(self.spec.device, past),
                past_bytes=past,
                faults=dict(self._past.faults),
                slots=len(slots),
                working_sessions=len(working),
                queued_sessions=sum(session.id not in slots for session in working),
                queued_tokens=sum(session.appended - session.state.length for session in working),
                counts={**self._steps.counts, **self._runner.policy.recall.counts},
            )

    def check_integrity(self, timeout_s: float = 60) -> None:
        """Wait until the engine is idle, then raise AssertionError if anything was lost or kept that shouldn't be."""
        with self._changed:
            idle = self._changed.wait_for(lambda: not self._stepping and self._scheduler.idle, timeout_s)
            assert idle, f"still at work after {timeout_s} s"
            held: Counter[str] = Counter()
            for session in self._sessions.values():
                held.update(session.past.keys)
                assert session.failure is not None or session.replayed_event is None, "an idle session lags behind"
                assert (
                    self._runner.policy.layout is None
                    or session.failure
                    or (session.past.segments * self.config.segment.segment_tokens == session.state.closed)
                ), "blocks don't match the state"
                assert session.id in self._scheduler.slots or not session.state.nbytes, "a state without a slot"
            assert held == self._past.keys_in_use, "blocks and their users don't match"
            assert set(self._scheduler.slots) <= set(self._sessions), "a slot without a session"
            assert len(self._scheduler.slots) <= self.config.slots, "more slots than there are"
            self._past.check_integrity()

    def shutdown(self) -> None:
        """Cancel all work, end the thread, release past KV. Idempotent."""
        with self._changed:
            self._running = False
            self._changed.notify_all()
        self._thread.join()
        for session_id in list(self._sessions):
            self.close(session_id)
        self._past.close()

    def _at_work(self) -> list[Session]:
        """Sessions with something to do. What is being stepped may stand between two states just now."""
        return [s for s in self._sessions.values() if s in self._stepping or s.next_step(self.config) is not Step.IDLE]

    def _check_new(self, session_id: str) -> None:
        if session_id in self._sessions:
            raise AlreadyExists(f"session {session_id!r} already exists; choose another id")
        if len(self._sessions) >= self.config.max_sessions:
            raise Busy(f"all {self.config.max_sessions} sessions are in use; delete one or try later")

    def _add(self, session: Session) -> None:
        self._sessions[session.id] = session
        self._scheduler.add(session)
        self._changed.notify_all()

    def _snapshot(self, session: Session) -> Snapshot:
        tensors = session.parked or apart(lambda: pack(session.state))
        if session.logits_V is not None:
            tensors = tensors | {"logits": session.logits_V.cpu()}
        marks = tuple(position for position, control in session.controls if isinstance(control, Mark))
        past = session.past
        return Snapshot(past.root, past.journal.copy(), past.keys, session.pending.copy(), marks, tensors)

    def _continue(self, session_id: str, snapshot: Snapshot, past: SessionPast, tenant: str) -> None:
        self._add(self._continued(session_id, snapshot, past, tenant))

    def _continued(self, session_id: str, snapshot: Snapshot, past: SessionPast, tenant: str) -> Session:
        """A new session that continues a snapshot, parked; what `past` holds is let go of if that fails."""
        session = Session(session_id, past, State([]), tenant, pending=snapshot.pending)
        session.appended = len(past.journal.tokens) + len(session.pending)
        session.controls.extend((position, Mark()) for position in snapshot.marks)
        try:
            apart(lambda: self._regain(session, snapshot))
        except Exception:
            past.truncate(0)
            raise
        return session

    @torch.inference_mode()
    def _regain(self, session: Session, snapshot: Snapshot) -> None:
        """Give a session a snapshot's state and its last logits; where its blocks don't all stand, of what does."""
        if self._take_up(session.past, snapshot.keys) and snapshot.tensors is not None:
            session.parked = dict(snapshot.tensors)
            logits = session.parked.pop("logits", None)
            session.state = counted(session.parked)
            session.logits_V = None if logits is None else logits.to(self.spec.device)
        else:
            session.state, session.logits_V = self._steps.resume(session, session.past.segments)
            self._steps.park(session)

    def _take_up(self, past: SessionPast, keys: Sequence[str]) -> bool:
        """Take up a past's blocks again, as far as that is quicker than to run them; whether all are there."""
        lacking = keys[past.segments :]
        with closing(past.heads(lacking)) as heads:
            for key in lacking:
                if not self._steps.restores(past, key):
                    return False
                try:
                    past.adopt(key, next(heads))
                except PastKVError as error:
                    log.warning("%s; running its tokens again", error.message)
                    return False
        return True

    def _place(self, session: Session, state: State) -> None:
        """Give a session a new state; it takes a slot when it has work."""
        session.state = state
        session.parked = None
        if session.id not in self._scheduler.slots:
            self._steps.park(session)

    def _find(self, session_id: str) -> Session:
        if session_id not in self._sessions:
            raise NotFound(f"session {session_id!r} doesn't exist here; create it first", session=session_id)
        return self._sessions[session_id]

    def _usable(self, session_id: str) -> Session:
        session = self._find(session_id)
        if session.failure is not None:
            raise session.failure
        return session

    def _at_rest(self, session_id: str) -> Session:
        """A usable session that isn't being stepped, and won't be while the lock is held."""
        self._usable(session_id)
        self._interrupt()
        return self._usable(session_id)

    def _interrupt(self) -> None:
        """Wait for the turn's end; no other begins while the lock is held."""
        self._interrupting += 1
        try:
            self._changed.wait_for(lambda: not self._stepping)
        finally:
            self._interrupting -= 1
            self._changed.notify_all()

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
            while self._take_turn():
                pass

    def _take_turn(self) -> bool:
        """One turn, once there is one; False when the engine ends. Nothing of it is held while the next is awaited."""
        turn = self._next_turn()
        if turn is not None:
            self._steps.run(*turn)
        return turn is not None

    def _drop_aborted(self) -> None:
        """End answers that aren't to begin any more, though tokens before them wait. No session is being stepped."""
        for session in self._sessions.values():
            last = session.controls[-1][1] if session.controls else None
            if isinstance(last, Generation) and last.aborted and session.due_control is not last:
                session.controls.pop()
                settle(last.done, "aborted")

    def _next_turn(self) -> tuple[Step, list[Session]] | None:
        """The next turn, once there is one; None when the engine ends."""
        with self._changed:
            self._stepping = []
            self._changed.notify_all()
            while self._running:
                self._drop_aborted()
                step, sessions = (Step.IDLE, []) if self._interrupting else self._scheduler.next()
                for session in self._scheduler.displaced():
                    self._steps.park(session)
                if sessions:
                    self._stepping = sessions
                    return step, sessions
                self._changed.wait()
            return None
