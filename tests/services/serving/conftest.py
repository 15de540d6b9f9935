"""Sessions on a tiny model in fp64, in this process: neither Ray nor gRPC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import segcore
from segcore.engine.engine import Engine
from segcore.weights import LoadedModel
from services.serving.config import ServeConfig
from services.serving.engine_deployment import EngineDeployment
from services.serving.session import Sessions
from tests.conftest import SERVED_SEGMENT
from tests.services.serving.fronts import RunningFront


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


@pytest.fixture(scope="module")
def engine(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineDeployment]:
    """What one replica runs, without Ray."""
    made = EngineDeployment(
        ServeConfig(
            model=str(model_directory),
            dtype="float32",
            device="cpu",
            threads=1,
            segment=SERVED_SEGMENT,
            chunk_tokens=64,
            past_directory=tmp_path_factory.mktemp("past-kv"),
            max_sessions=8,
            max_session_tokens=4000,
            max_document_bytes=10_000,
            max_data_bytes=4096,
        )
    )
    yield made
    made._engine.check_integrity()
    made._engine.shutdown()


@pytest.fixture(scope="module")
def front(engine: EngineDeployment) -> Iterator[Callable[..., RunningFront]]:
    """Makes fronts before it; changes are of the configuration."""
    made: list[RunningFront] = []

    def make(**changes: object) -> RunningFront:
        made.append(RunningFront(engine, engine._config.model_copy(update=changes)))
        return made[-1]

    yield make
    for one in made:
        one.close()
