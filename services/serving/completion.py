"""Answers to prompts that stand for themselves: a stream of its own each, gone when the answer ends.

Prompts that begin alike share past KV as sessions do, so a client that sends a growing conversation again and again
has only its news run.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing

from segcore.engine.engine import Engine
from segcore.errors import InvalidRequest, LimitExceeded
from segcore.sampling import SamplingParams
from segcore.text import ChatFormat, check_question
from segcore.turns import Conversation
from segcore.weights import LoadedModel
from services.serving.answer import Answer
from services.serving.messages import AnswerPart, Prompt


class Completions:
    """All such answers of one engine."""

    def __init__(self, model: LoadedModel, engine: Engine) -> None:
        self._model, self._engine = model, engine

    async def complete(self, tenant: str, prompt: Prompt, params: SamplingParams) -> AsyncIterator[AnswerPart]:
        """Stream the answer. Closing the iterator ends it. Raises InvalidRequest, LimitExceeded, Busy."""
        tokens, marks = await asyncio.to_thread(self._lay_out, prompt)
        limit = self._engine.max_stream_tokens
        if len(tokens) >= limit:
            raise LimitExceeded(f"the prompt has {len(tokens)} tokens, with the answer at most {limit}", field="prompt")
        key = f"{tenant}/completion.{uuid.uuid4().hex}"  # no session's id has a dot
        self._engine.open(key, tenant=tenant)
        try:
            for first, stop in zip((0, *marks), (*marks, len(tokens)), strict=True):
                self._engine.append(key, tokens[first:stop])
                if stop in marks:
                    self._engine.mark(key)
            answer = Answer(self._model, params)
            self._engine.generate(key, answer.generation)
            async with aclosing(answer.parts(len(tokens))) as parts:
                async for part in parts:
                    yield part
        finally:
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
