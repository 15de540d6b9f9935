"""Sessions on a tiny model in fp64, in this process: neither Ray nor gRPC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import segcore
from segcore.engine.engine import Engine
from segcore.weights import LoadedModel
from services.serving.config import ServeConfig
from services.serving.session import Sessions
from tests.conftest import SERVED_SEGMENT


@pytest.fixture(scope="session")
def served_model(model_directory: Path) -> LoadedModel:
    return segcore.load_model(str(model_directory), dtype="float64", device="cpu")


@pytest.fixture
def config(model_directory: Path, tmp_path: Path) -> ServeConfig:
    return ServeConfig(
        model=str(model_directory),
        dtype="float64",
        device="cpu",
        segment=SERVED_SEGMENT,
        chunk_tokens=64,
        past_directory=tmp_path / "past-kv",
        max_sessions=8,
    )


@pytest.fixture
def replica(served_model: LoadedModel, config: ServeConfig) -> Iterator[Callable[..., Sessions]]:
    """Makes what one replica has: sessions on an engine of their own; changes are of the configuration."""
    engines: list[Engine] = []

    def make(**changes: object) -> Sessions:
        changed = config.model_copy(update=changes)
        engines.append(Engine(served_model.lm, served_model.identified(changed.engine_config())))
        return Sessions(served_model, engines[-1], changed)

    yield make
    for engine in engines:
        engine.check_integrity()
        engine.shutdown()
