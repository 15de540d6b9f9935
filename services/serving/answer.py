"""An answer on its way from the engine's thread to the event loop, where it becomes text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from segcore.engine.request import Generation
from segcore.sampling import Logprobs, SamplingParams
from segcore.text import AnswerText
from segcore.weights import LoadedModel
from services.serving.messages import AnswerPart, TokenLogprob


class Answer:
    """Give its `generation` to the engine, then read its `parts`."""

    def __init__(self, model: LoadedModel, params: SamplingParams) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[AnswerPart | None] = asyncio.Queue()  # holds at most max_tokens parts
        self._model = model
        self._logprobs: list[Logprobs] = []  # of tokens whose text isn't certain yet
        self.text = AnswerText(model.tokenizer, model.end_tokens, params.stop)
        self.generation = Generation(params, self._on_token)
        self.last_token: int | None = None
        self.generation.done.add_done_callback(self.on_loop(lambda: self._queue.put_nowait(None)))

    async def parts(self, prompt_tokens: int) -> AsyncGenerator[AnswerPart]:
        """The answer's parts, the last with its counts. Raises what ended the generation, if that was an error."""
        while (part := await self._queue.get()) is not None:
            yield part
        reason = self.generation.done.result()
        text = self.text.flush()
        yield AnswerPart(
            text=text,
            finish_reason=reason,
            prompt_tokens=prompt_tokens,
            answer_tokens=self.generation.tokens,
            logprobs=self._take_logprobs(),
        )

    def on_loop(self, call: Callable[[], None]) -> Callable[[object], None]:
        return lambda _: call_soon(self._loop, call)

    def _on_token(self, token: int) -> bool:
        self.last_token = token
        text = self.text.push(token)
        if self.generation.logprobs is not None and token not in self._model.end_tokens:
            self._logprobs.append(self.generation.logprobs)
        if text:
            part = AnswerPart(text=text, logprobs=self._take_logprobs())
            call_soon(self._loop, lambda: self._queue.put_nowait(part))
        return self.text.finished

    def _take_logprobs(self) -> tuple[TokenLogprob, ...]:
        taken, self._logprobs = self._logprobs, []
        decode = self._model.tokenizer.decode_token
        return tuple(
            TokenLogprob(decode(one.token), one.logprob, tuple((decode(t), p) for t, p in one.likeliest))
            for one in taken
        )


def call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call on a loop from any thread; nothing happens if the loop has ended."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)
