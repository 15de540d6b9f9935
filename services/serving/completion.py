"""Answers to prompts that stand for themselves: a stream of its own each, gone when the answer ends.

Prompts that begin alike share past KV as sessions do, so a client that sends a growing conversation again and again
has only its news run.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress

from segcore.engine.engine import Engine
from segcore.engine.request import Generation
from segcore.errors import InvalidRequest, LimitExceeded, NotFound
from segcore.sampling import Logprobs, SamplingParams
from segcore.text import AnswerText, ChatFormat, check_question
from segcore.turns import Conversation
from segcore.weights import LoadedModel
from services.serving.messages import AnswerPart, Prompt, TokenLogprob


class Completions:
    """All such answers of one engine."""

    def __init__(
        self, model: LoadedModel, engine: Engine, room: Callable[[str, str], AbstractAsyncContextManager[None]]
    ) -> None:
        """room: makes room in the engine, for a tenant's stream of a name."""
        self._model, self._engine, self._room = model, engine, room

    async def complete(
        self, tenant: str, prompt: Prompt, params: SamplingParams, after: int = 0
    ) -> AsyncGenerator[AnswerPart]:
        """Stream the answer, from the token after the first `after` on. Closing the iterator ends it.

        Raises InvalidRequest, LimitExceeded, Busy.
        """
        tokens, marks = await asyncio.to_thread(self._lay_out, prompt)
        limit = self._engine.max_stream_tokens
        if len(tokens) >= limit:
            raise LimitExceeded(f"the prompt has {len(tokens)} tokens, with the answer at most {limit}", field="prompt")
        name = f"completion.{uuid.uuid4().hex}"  # no session's id has a dot
        async with self._room(tenant, name), self._stream(f"{tenant}/{name}", tenant) as key:
            for first, stop in zip((0, *marks), (*marks, len(tokens)), strict=True):
                self._engine.append(key, tokens[first:stop])
                if stop in marks:
                    self._engine.mark(key)
            answer = _Answer(self._model, params)
            self._engine.generate(key, answer.generation)
            async with aclosing(answer.parts(len(tokens))) as parts:
                if not after:
                    yield AnswerPart(text="", input_tokens=len(tokens))
                async for part in parts:
                    if part.token_index > after or part.finish_reason is not None:
                        yield part

    @asynccontextmanager
    async def _stream(self, key: str, tenant: str) -> AsyncIterator[str]:
        self._engine.open(key, tenant=tenant)
        try:
            yield key
        finally:
            with suppress(NotFound):  # the engine has ended
                await asyncio.shield(asyncio.to_thread(self._engine.close, key))

    def _lay_out(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """The prompt's tokens, and the indices of those that follow an end of turn."""
        text = self._model.tokenizer
        if isinstance(prompt, str):
            check_question(prompt)
            bare = Conversation(text, ChatFormat.bare(text))
            bare.ask(prompt)
            return bare.tokens, bare.marks
        if isinstance(prompt[0], int):
            return list(prompt), [len(prompt) - 1]
        return self._converse(prompt)

    def _converse(self, messages: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        (role, content), *rest = messages
        system = content if role == "system" else None
        turns = messages if system is None else rest
        in_turn = [("user", "assistant")[i % 2] for i in range(len(turns))]
        if [role for role, _ in turns] != in_turn or in_turn[-1:] != ["user"]:
            raise InvalidRequest(
                "messages must be a system message, if any, then a user's and the assistant's in turn, a user's last",
                field="messages",
            )
        model = self._model
        chat = model.chat if system is None else ChatFormat.of(model.tokenizer, system)
        conversation = Conversation(model.tokenizer, chat, min(model.end_tokens, default=None))
        for role, content in turns:
            if role == "user":
                check_question(content)
                conversation.ask(content)
            else:
                conversation.answer(content)
        return conversation.tokens, conversation.marks


class _Answer:
    """An answer on its way to the event loop: give its `generation` to the engine, then read its `parts`."""

    def __init__(self, model: LoadedModel, params: SamplingParams) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[AnswerPart | None] = asyncio.Queue()  # holds at most max_tokens parts
        self._model = model
        self._logprobs: list[Logprobs] = []  # of tokens whose text isn't certain yet
        self._text = AnswerText(model.tokenizer, model.end_tokens, params.stop)
        self.generation = Generation(params, self._on_token)
        self.generation.done.add_done_callback(lambda _: self._put(None))

    async def parts(self, prompt_tokens: int) -> AsyncGenerator[AnswerPart]:
        """The answer's parts, the last with its counts. Raises what ended the generation, if that was an error."""
        while (part := await self._queue.get()) is not None:
            yield part
        reason = self.generation.done.result()
        text = self._text.flush()
        yield AnswerPart(
            text=text,
            token_index=self.generation.tokens,
            finish_reason=reason,
            prompt_tokens=prompt_tokens,
            answer_tokens=self.generation.tokens,
            logprobs=self._take_logprobs(),
        )

    def _on_token(self, token: int) -> bool:
        text = self._text.push(token)
        if self.generation.logprobs is not None and token not in self._model.end_tokens:
            self._logprobs.append(self.generation.logprobs)
        if text:
            self._put(AnswerPart(text=text, token_index=self.generation.tokens, logprobs=self._take_logprobs()))
        return self._text.finished

    def _take_logprobs(self) -> tuple[TokenLogprob, ...]:
        taken, self._logprobs = self._logprobs, []
        decode = self._model.tokenizer.decode_token
        return tuple(
            TokenLogprob(decode(one.token), one.logprob, tuple((decode(t), p) for t, p in one.likeliest))
            for one in taken
        )

    def _put(self, part: AnswerPart | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, part)
