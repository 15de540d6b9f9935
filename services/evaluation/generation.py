"""An answer of an engine of this process, timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from segcore.engine.engine import Engine
from segcore.engine.request import Generation
from segcore.sampling import SamplingParams
from segcore.text import AnswerText


@dataclass(frozen=True)
class Generated:
    """first_token_s: from the question to the first token. answer_s: from there to the end. retrieved: positions in
    the stream of what the answer's first pass retrieved."""

    text: str
    tokens: int
    first_token_s: float
    answer_s: float
    retrieved: list[int]


def generate(
    engine: Engine,
    session: str,
    before: Sequence[int],
    after: Sequence[int],
    params: SamplingParams,
    text: AnswerText,
) -> Generated:
    """Add the tokens before an end of turn and those after it, and answer. Raises SegcoreError."""
    began = time.monotonic()
    engine.append(session, before)
    engine.mark(session)
    engine.append(session, after)
    engine.flush(session).result()
    retrieved = engine.retrieved(session)
    parts: list[str] = []
    times: list[float] = []

    def on_token(token: int) -> bool:
        times.append(time.monotonic())
        parts.append(text.push(token))
        return text.finished

    generation = Generation(params, on_token)
    engine.generate(session, generation)
    generation.done.result()
    parts.append(text.flush())
    return Generated("".join(parts), generation.tokens, times[0] - began, times[-1] - times[0], retrieved)
