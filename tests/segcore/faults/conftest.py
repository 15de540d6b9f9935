"""Engines with little host memory, and what they must answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from segcore.config import CacheConfig, EngineConfig
from segcore.engine.engine import Engine
from segcore.model import CausalLM
from tests.segcore.engines import engine_of
from tests.segcore.faults.engines import LITTLE, answer, read


@pytest.fixture
def make_engine(tiny_lm, running) -> Callable[..., Engine]:
    """Makes engines; options that aren't the engine's are the cache's."""

    def make(lm: CausalLM = tiny_lm, /, *, host_bytes: int = LITTLE, **changes: object) -> Engine:
        engine = {f.name for f in dataclasses.fields(EngineConfig)}
        cache = {name: changes.pop(name) for name in list(changes) if name not in engine}
        return running(engine_of(lm, **changes, cache=CacheConfig(host_bytes=host_bytes, **cache)))

    return make


@pytest.fixture(scope="session")
def undisturbed(tiny_lm: CausalLM) -> list[int]:
    engine = engine_of(tiny_lm)
    read(engine)
    tokens = answer(engine)
    engine.shutdown()
    return tokens
