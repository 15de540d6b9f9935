"""What tests of the engine share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from segcore.engine.engine import Engine
from tests.segcore.engines import engine_of


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def running() -> Iterator[Callable[[Engine], Engine]]:
    """Takes the engines that a test makes: at its end their books must balance, and they are shut down."""
    made: list[Engine] = []

    def run(engine: Engine) -> Engine:
        made.append(engine)
        return engine

    yield run
    for engine in made:
        engine.check_integrity()
        engine.shutdown()


@pytest.fixture
def make_engine(tiny_lm, running) -> Callable[..., Engine]:
    return lambda **changes: running(engine_of(tiny_lm, **changes))
