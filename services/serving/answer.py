"""An answer on its way from the engine's thread to the event loop, in tokens and the text that they make certain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from segcore.engine.request import Generation
from segcore.errors import SegcoreError
from segcore.sampling import SamplingParams
from segcore.text import AnswerText
from segcore.weights import LoadedModel
from services.serving.messages import AnswerPart

# Tokens that come closer together than this share a message, and a write.
COALESCE_S = 0.02


class Batch(NamedTuple):
    """Tokens, and the text that became certain with them. ended: no more will come."""

    tokens: list[int]
    text: str
    ended: bool


class Answer:
    """An answer that goes on after the tokens `given`, written down by a task of its own, and read by one stream.

    head: the text of those after the first `after`. complete: no token is lacking. why: what made it stop before its
    end; cancelled: then it is to end there, else it can be taken up again.
    """

    def __init__(self, model: LoadedModel, params: SamplingParams, given: Sequence[int] = (), after: int = 0) -> None:
        self._loop = asyncio.get_running_loop()
        # Both hold at most max_tokens.
        self._queue: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        self.parts: asyncio.Queue[AnswerPart | SegcoreError | None] = asyncio.Queue()
        self._next_batch = 0.0
        self.text = AnswerText(model.tokenizer, model.end_tokens, params.stop)
        texts = [self.text.push(token) for token in given]
        self.head = "".join(texts[after:])
        self.complete = self.text.finished or len(given) >= params.max_tokens
        self.generation = Generation(params, self._on_token, tokens=len(given))
        self.generation.done.add_done_callback(lambda _: self._call_soon(lambda: self._queue.put_nowait(None)))
        self.why: SegcoreError | None = None
        self.cancelled = False
        self.task: asyncio.Task[None] | None = None

    async def batch(self) -> Batch:
        """The next tokens: the first at once, later ones in company."""
        item = await self._queue.get()
        if item is not None and (pause := self._next_batch - self._loop.time()) > 0:
            await asyncio.sleep(pause)
        self._next_batch = self._loop.time() + COALESCE_S
        tokens, texts = list[int](), list[str]()
        while item is not None:
            tokens.append(item[0])
            texts.append(item[1])
            if self._queue.empty():
                break
            item = self._queue.get_nowait()
        return Batch(tokens, "".join(texts), item is None)

    def _on_token(self, token: int) -> bool:
        text = self.text.push(token)
        self._call_soon(lambda: self._queue.put_nowait((token, text)))
        return self.text.finished

    def _call_soon(self, call: Callable[[], None]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)
