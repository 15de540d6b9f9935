"""Engines that may write to disk, where they leave nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from segcore.config import CacheConfig
from segcore.engine.engine import Engine
from tests.segcore.engines import engine_of


@pytest.fixture(autouse=True)
def _leaves_nothing(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob("engine-*"))


@pytest.fixture
def make_engine(_leaves_nothing, tiny_lm, tmp_path, running) -> Callable[..., Engine]:
    return lambda **changes: running(engine_of(tiny_lm, **{"cache": CacheConfig(directory=tmp_path)} | changes))
