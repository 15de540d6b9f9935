"""Engines on tiny models, and how tests ask them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from segcore.config import EngineConfig
from segcore.engine.engine import Engine
from segcore.engine.request import Generation, Session, Step
from segcore.model import CausalLM
from segcore.sampling import SamplingParams
from tests.conftest import VOCABULARY, tiny_segment
from tests.segcore.test_invariants import MATRIX

SECONDS = 30
STREAM = torch.randint(0, VOCABULARY, (90,), generator=torch.Generator().manual_seed(11)).tolist()
# Every policy; the quick tests run one.
POLICIES = [
    pytest.param(name, marks=() if name == "segmented" else pytest.mark.slow)
    for name in sorted({config.policy: name for name, config in reversed(MATRIX.items())}.values())
]


def engine_of(lm: CausalLM, **changes: object) -> Engine:
    """An engine of tiny segments and chunks of 8 tokens; `changes` are fields of EngineConfig."""
    values: dict[str, object] = {"segment": tiny_segment(), "chunk_tokens": 8}
    return Engine(lm, EngineConfig(**(values | changes)))  # type: ignore[arg-type]


def fill(engine: Engine, session: str, stream: list[int], *, mark: bool = False) -> None:
    engine.append(session, stream)
    if mark:
        engine.mark(session)
    engine.flush(session).result(SECONDS)


def generation(
    tokens: list[int],
    count: int = 12,
    *,
    stop_at: int | None = None,
    at_token: Callable[[int], None] = lambda count: None,
    **params: object,
) -> Generation:
    """An answer whose tokens go to `tokens`; `at_token` is told how many there are; it ends with number `stop_at`."""

    def on_token(token: int) -> bool:
        tokens.append(token)
        at_token(len(tokens))
        return len(tokens) == stop_at

    return Generation(SamplingParams(max_tokens=count, **params), on_token)  # type: ignore[arg-type]


def ask(engine: Engine, session: str, count: int = 12, **params: object) -> tuple[list[int], Generation]:
    """Begin an answer: its tokens so far, and what tells that it ended."""
    tokens: list[int] = []
    asked = generation(tokens, count, **params)  # type: ignore[arg-type]
    engine.generate(session, asked)
    return tokens, asked


def answer(engine: Engine, session: str, count: int = 12, **params: object) -> list[int]:
    """A whole answer of `count` tokens."""
    tokens, asked = ask(engine, session, count, **params)
    assert asked.done.result(SECONDS) == "length"
    return tokens


@contextmanager
def at_rest(engine: Engine) -> Iterator[None]:
    """The engine's thread waits meanwhile: what is asked for within begins together, after it."""
    with engine._changed:
        engine._interrupt()
        yield


def turns(engine: Engine) -> list[tuple[Step, str]]:
    """Every turn from now on, and the names of its sessions."""
    seen: list[tuple[Step, str]] = []
    run = engine._steps.run

    def noted(step: Step, sessions: list[Session]) -> None:
        seen.append((step, "".join(session.id for session in sessions)))
        run(step, sessions)

    engine._steps.run = noted  # type: ignore[method-assign]
    return seen
