"""Questions and their answers, which go on after any break: their tokens are written down before they are sent."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, replace

from segcore.engine.engine import Engine
from segcore.errors import Cancelled, DeadlineExceeded, FailedPrecondition, InvalidRequest, SegcoreError, Unavailable
from segcore.sampling import FinishReason, SamplingParams
from segcore.text import AnswerText, check_question
from segcore.weights import LoadedModel
from services.serving.answer import Answer
from services.serving.directory.base import changed
from services.serving.documents import check_none_open, check_room, opening_tokens
from services.serving.live import Live
from services.serving.lives import Lives
from services.serving.messages import AnswerPart
from services.serving.record import Done, Entry, OpenAnswer, digest_of, reused

MAX_QUESTION_CHARS = 100_000


@dataclass(frozen=True)
class Request:
    """What is asked; see `Sessions.generate`. digest: of question and parameters."""

    question: str
    params: SamplingParams
    request_id: str
    after: int
    expected_generation: int | None
    digest: str


class Answers:
    """What `Sessions` does with questions; the session is in use."""

    def __init__(self, model: LoadedModel, engine: Engine, lives: Lives) -> None:
        self._model, self._engine, self._lives = model, engine, lives

    def request(
        self, question: str, params: SamplingParams, request_id: str, after: int, expected_generation: int | None
    ) -> Request:
        """Raises InvalidRequest."""
        check_question(question)
        if len(question) > MAX_QUESTION_CHARS:
            raise InvalidRequest(
                f"the question is longer than {MAX_QUESTION_CHARS} characters; upload it as a document",
                field="question",
            )
        if after < 0 or (after and not request_id):
            raise InvalidRequest(f"after_token={after} needs the request_id of the answer", field="after_token")
        digest = digest_of("generate", question=question, params=asdict(params))
        return Request(question, params, request_id, after, expected_generation, digest)

    async def stream(
        self, live: Live, request: Request, timeout_s: float | None, slice_s: float | None
    ) -> AsyncGenerator[AnswerPart]:
        began = time.monotonic()
        await self._supersede(live, request)
        async with self._lives.claimed(live):
            done = live.record.known(request.request_id, request.digest)
            self._check(live, request, done)
            if done is None:
                await self._lives.residents.take_up(live)
                answer = await self._begin(live, request)
                now, points = live.record.answer, live.record.points
                begun = points[-1].tokens if points else 0  # where the question is put
                input_tokens = now.first_token - begun if now is not None and not live.given else 0
        if done is not None:
            yield await self._again(live, done, request)
            return
        loop, timers = asyncio.get_running_loop(), list[asyncio.TimerHandle]()
        if timeout_s is not None:
            late = DeadlineExceeded(f"the time of {timeout_s} s is up; the answer can be taken up again")
            timers.append(loop.call_at(loop.time() + began + timeout_s - time.monotonic(), self._stop, answer, late))
        if slice_s is not None:
            timers.append(loop.call_later(slice_s, self._stop, answer, None))
        try:
            while (part := await answer.parts.get()) is not None:
                if isinstance(part, SegcoreError):
                    raise part
                yield replace(part, input_tokens=input_tokens)
                input_tokens = 0
        finally:
            for timer in timers:
                timer.cancel()
            # Whoever leaves early may come back, with the request's id.
            self._stop(answer, Cancelled("the caller left"), end=not request.request_id)
            assert answer.task is not None
            await asyncio.wait([answer.task])

    async def cancel(self, live: Live, request_id: str = "") -> None:
        """End the session's answer; with a request_id, that one alone."""

        def meant() -> bool:
            now = live.record.answer
            return now is not None and request_id in ("", now.request_id)

        answer = live.answer
        if answer is not None and answer.task is not None and meant():
            self._stop(answer, Cancelled("the answer was cancelled"), end=True)
            await asyncio.wait([answer.task])
        async with self._lives.claimed(live):
            if live.answer is None and meant():
                await self._end(live, [], "aborted")

    async def _supersede(self, live: Live, request: Request) -> None:
        """A caller who is back takes over from the stream that it left."""
        answer, now = live.answer, live.record.answer
        if answer is not None and now is not None and request.request_id and now.request_id == request.request_id:
            self._stop(answer, Unavailable("another call goes on with this answer"))
            assert answer.task is not None
            await asyncio.wait([answer.task])

    def _stop(self, answer: Answer, why: SegcoreError | None, *, end: bool = False) -> None:
        """Break an answer off at the next token. end: for good. why: what its reader is told; None: nothing."""
        answer.why, answer.cancelled = answer.why or why, answer.cancelled or end
        self._engine.abort(answer.generation)

    def _check(self, live: Live, request: Request, done: Done | None) -> None:
        """Raise what stands against it."""
        now = live.record.answer
        ours = now is not None and request.request_id != "" and now.request_id == request.request_id
        if now is not None and ours and now.digest != request.digest:
            raise reused(request.request_id)
        if now is not None and (not ours or live.answer is not None) and done is None:
            raise FailedPrecondition(
                f"session {live.name.session_id!r} is answering; wait for the answer's end, or cancel it",
                request_id=now.request_id,
            )
        tokens = done.answer_tokens if done is not None else len(live.given) if ours else 0
        if request.after > tokens:
            raise FailedPrecondition(
                f"answer {request.request_id!r} has {tokens} tokens, not the {request.after} that are said to be known",
                answer_tokens=tokens,
            )
        if done is None and not ours and request.expected_generation not in (None, live.generation):
            raise changed(live.name, live.generation)

    async def _ask(self, live: Live, request: Request) -> None:
        """Put the question and its turn mark into the stream."""
        chat, tokenizer, record = self._model.chat, self._model.tokenizer, live.record
        check_none_open(record)
        encode = tokenizer.encode_continuation if record.turn_open else tokenizer.encode
        before, after = chat.prompt_tail(opening_tokens(self._model, live) + encode(request.question))
        tokens = [*before, *after]
        length = check_room(self._engine, live, len(tokens) + 1) - 1
        record.turn_open = False
        record.answer = OpenAnswer(
            request_id=request.request_id,
            digest=request.digest,
            sampling=asdict(request.params),
            first_token=length,
            first_entry=live.entries + 1,
        )
        live.given = array("i")
        entry = Entry(tokens, stops=[~len(before), len(tokens)], data=request.question.encode())
        await self._lives.commit(live, entry)
        self._engine.append(live.key, before)
        self._engine.mark(live.key)
        self._engine.append(live.key, after)

    async def _begin(self, live: Live, request: Request) -> Answer:
        """Ask, unless that has been done, and let the answer be made."""
        if live.record.answer is None:
            await self._ask(live, request)
        answer = Answer(self._model, request.params, live.given, request.after)
        if not answer.complete:
            self._engine.generate(live.key, answer.generation)
        live.answer = answer
        answer.task = asyncio.create_task(self._write(live, answer))
        return answer

    async def _write(self, live: Live, answer: Answer) -> None:
        """Write the answer down as it is made, then pass it on: whether anyone reads doesn't matter."""

        def interrupt(reason: asyncio.Future[SegcoreError]) -> None:
            self._stop(answer, reason.result())

        interrupted = live.interrupted
        interrupted.add_done_callback(interrupt)
        try:
            await self._write_parts(live, answer)
        except SegcoreError as error:
            live.trusted = False  # tokens may have been made that aren't written down
            answer.parts.put_nowait(interrupted.result() if interrupted.done() else live.ending or error)
        except BaseException:
            live.trusted = False
            raise
        finally:
            interrupted.remove_done_callback(interrupt)
            live.answer = None
            answer.parts.put_nowait(None)

    async def _write_parts(self, live: Live, answer: Answer) -> None:
        if answer.head:
            self._pass_on(live, answer, answer.head)
        if answer.complete:
            answer.parts.put_nowait(await self._end(live, [], "stop" if answer.text.finished else "length", answer))
            return
        ended = False
        while not ended:
            tokens, text, ended = await answer.batch()
            reason = answer.generation.done.result() if ended else "aborted"
            if reason != "aborted" or (ended and answer.cancelled):
                answer.parts.put_nowait(await self._end(live, tokens, reason, answer, text))
            elif tokens:
                await self._lives.commit(live, Entry(tokens, stops=range(len(tokens))), note=False)
                live.given.extend(tokens)
                self._pass_on(live, answer, text)
        if answer.why is not None:
            if self._engine.session_stats(live.key).pending_tokens:
                await self._lives.residents.let_go(live)
            if not answer.cancelled:
                details = answer.why.details | {"token_index": str(len(live.given))}
                answer.parts.put_nowait(type(answer.why)(answer.why.message, **details))

    def _pass_on(self, live: Live, answer: Answer, text: str) -> None:
        answer.parts.put_nowait(AnswerPart(text=text, token_index=len(live.given), generation=live.generation))

    async def _end(
        self, live: Live, tokens: list[int], reason: FinishReason, answer: Answer | None = None, text: str = ""
    ) -> AnswerPart:
        """The answer has ended, with these last tokens: write that down; the part that says so."""
        record, now = live.record, live.record.answer
        assert now is not None
        given = array("i", [*live.given, *tokens])
        # The last token of an answer that was broken off has been run; else it runs with what comes next.
        stops = [*range(len(tokens)), len(tokens)] if reason == "aborted" and given else list(range(len(tokens)))
        entries = [Entry(tokens, stops)] if stops else []
        record.answer, record.last_token = None, given[-1] if given else None
        record.tokens, record.entries = live.tokens + len(tokens), live.entries + len(entries)
        done = Done(
            digest=now.digest,
            first_token=now.first_token,
            first_entry=now.first_entry,
            last_entry=record.entries,
            answer_tokens=len(given),
            finish_reason=reason,
        )
        record.remember(now.request_id, done)
        record.point()
        await self._lives.commit(live, *entries)
        if live.resident and reason == "aborted":
            self._engine.flush(live.key)
        live.given = array("i")
        rest = "" if answer is None else answer.text.flush()
        return self._last_part(live, done, text + rest)

    async def _again(self, live: Live, done: Done, request: Request) -> AnswerPart:
        """What is left of an answer that has ended, from the log."""
        directory = self._lives.directory
        log = await self._lives.run(lambda: list(directory.log(live.name, done.first_entry, done.last_entry)))
        tokens = [token for entry in log for token in Entry.read(entry).tokens]
        text = AnswerText(self._model.tokenizer, self._model.end_tokens, request.params.stop)
        texts = [text.push(token) for token in tokens]
        return self._last_part(live, done, "".join([*texts[request.after :], text.flush()]))

    def _last_part(self, live: Live, done: Done, text: str) -> AnswerPart:
        return AnswerPart(
            text=text,
            token_index=done.answer_tokens,
            finish_reason=done.finish_reason,
            prompt_tokens=done.first_token,
            answer_tokens=done.answer_tokens,
            generation=live.generation,
        )
