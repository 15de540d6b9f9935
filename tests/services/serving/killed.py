"""A replica in a process of its own that is killed at a moment: by itself, so that the moment is exact."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import segcore
from segcore import text
from segcore.engine.engine import Engine
from segcore.engine.runner import Runner
from segcore.errors import AlreadyExists, Unavailable
from segcore.policies.retrieving import RetrievingPolicy
from segcore.sampling import SamplingParams
from services.serving.config import ServeConfig
from services.serving.directory.sqlite import SqliteDirectory
from services.serving.session import Sessions
from tests.services.serving.conftest import QUESTION, upload

ANSWERS = (
    SamplingParams(max_tokens=40, stop=("ÿ",)),
    SamplingParams(max_tokens=40, stop=("ÿ",), temperature=1.0, seed=5),
)
# A moment: what is called then, whether the call is carried out first, and which of its calls count.
Moment = tuple[Any, str, bool, Callable[..., bool]]
MOMENTS: dict[str, Moment] = {
    "before a write of the session": (SqliteDirectory, "commit", False, lambda *_, **__: True),
    "after a write of the session": (SqliteDirectory, "commit", True, lambda *_, **__: True),
    "prefill": (Runner, "forward", False, lambda _, tokens_BT, *__, **___: tokens_BT.shape[1] > 1),
    "decode": (Runner, "forward", True, lambda _, tokens_BT, *__, **___: tokens_BT.shape[1] == 1),
    "refresh": (RetrievingPolicy, "_choose_anew", False, lambda *_, **__: True),
    "snapshot": (os, "replace", False, lambda *_, **__: True),  # a block is written, and not yet there
}


def kill_at(moment: str, calls: int) -> None:
    """End this process, without a trace, at the moment's so many-th call."""
    place, name, after, counts = MOMENTS[moment]
    call, left = getattr(place, name), calls

    def killing(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= bool(counts(*args, **options))
        last = left == 0 and counts(*args, **options)
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = call(*args, **options)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(place, name, killing)


def replica(pipe: Connection, config: ServeConfig, jobs: dict[str, tuple[bytes, list[int]]], kill: Any) -> None:
    """Bring sessions to their end, at once, telling each part of an answer as (session, answer, text, tokens, whole).

    jobs: of each session its document, and how many tokens of its answers are known already. kill: a moment, and which
    of its calls; None: not at all.
    """
    text.PIECE_CHARS = 128
    model = segcore.load_model(config.model, dtype="float64", device="cpu")
    engine = Engine(model.lm, model.identified(config.engine_config()))
    if kill is not None:
        kill_at(*kill)

    async def bring(sessions: Sessions, name: str, document: bytes, known: list[int]) -> None:
        with suppress(AlreadyExists):
            await sessions.create("", name)
        if not any(uploaded.finished for uploaded in (await sessions.get("", name)).documents):
            await upload(sessions, name, document)
        for i, params in enumerate(ANSWERS):
            parts = sessions.generate("", name, QUESTION, params, request_id=f"answer-{i}", after=known[i])
            async for part in parts:
                known[i] = part.token_index
                pipe.send((name, i, part.text, part.token_index, part.finish_reason is not None))
        assert await sessions.document_bytes("", name, "d") == document

    async def surely(sessions: Sessions, name: str, document: bytes, known: list[int]) -> None:
        while True:
            try:
                return await bring(sessions, name, document, known)
            except Unavailable:  # the lease of the one that was killed lasts still
                await asyncio.sleep(0.05)

    async def work() -> None:
        sessions = Sessions(model, engine, config)
        await asyncio.gather(*(surely(sessions, name, *job) for name, job in jobs.items()))
        await sessions.drain()
        sessions.close()

    asyncio.run(work())
    engine.shutdown()
    pipe.close()
