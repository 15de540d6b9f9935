"""Sessions on a tiny model in fp64, in this process: neither Ray nor gRPC."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

import segcore
from segcore import text
from segcore.engine.engine import Engine
from segcore.errors import SegcoreError
from segcore.sampling import SamplingParams
from segcore.weights import LoadedModel
from services.serving.config import ServeConfig
from services.serving.engine_deployment import EngineDeployment
from services.serving.messages import AnswerPart
from services.serving.session import Sessions
from tests.conftest import SERVED_SEGMENT
from tests.services.serving.fronts import Loop, RunningFront

# Some 1,100 tokens: 17 segments. Characters of several bytes fall on the borders of messages.
DOCUMENT = "".join(f"Entry {i}: the café at № {i * 7919 % 10007}.\n" for i in range(36)).encode()
QUESTION = "When does the café open?"
GREEDY = SamplingParams(max_tokens=40, stop=("ÿ",))
SAMPLED = SamplingParams(max_tokens=40, stop=("ÿ",), temperature=1.0, seed=5)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens come while a document does, though it is short."""
    monkeypatch.setattr(text, "PIECE_CHARS", 128)


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
        past_shared=str(tmp_path / "shared"),
        sessions=str(tmp_path / "sessions.sqlite"),
        max_sessions=8,
        lease_s=60,
    )


@pytest_asyncio.fixture
async def replica(served_model: LoadedModel, config: ServeConfig) -> AsyncIterator[Callable[..., Sessions]]:
    """Makes what one replica has: sessions of the one directory, on an engine of their own; changes are of the
    configuration."""
    made: list[Sessions] = []

    def make(**changes: object) -> Sessions:
        changed = config.model_copy(update=changes)
        engine = Engine(served_model.lm, served_model.identified(changed.engine_config()), changed.cipher())
        made.append(Sessions(served_model, engine, changed))
        return made[-1]

    yield make
    for sessions in made:
        await sessions.drain()
        sessions._engine.check_integrity()
        sessions._engine.shutdown()
        sessions.close()


async def upload(
    sessions: Sessions, name: str = "s", document: bytes = DOCUMENT, *, document_id: str = "d", piece: int = 97
) -> None:
    """A whole document, from where it is."""
    ack = await sessions.open_document("", name, document_id, None)
    for offset in range(ack.committed_offset, len(document), piece):
        data = document[offset : offset + piece]
        ack = await sessions.append("", name, document_id, offset, data)
        while ack.waiting:
            ack = await sessions.append("", name, document_id, offset + len(data), b"")
    while not ack.finished:
        ack = await sessions.finish("", name, document_id, len(document), hashlib.sha256(document).digest())


async def ask(sessions: Sessions, name: str = "s", params: SamplingParams = GREEDY, **options: object) -> str:
    """A whole answer, or what is left of it."""
    parts = sessions.generate("", name, QUESTION, params, **options)  # type: ignore[arg-type]
    return "".join([part.text async for part in parts])


async def rest_of(parts: AsyncGenerator[AnswerPart]) -> tuple[str, int, SegcoreError | None]:
    """The text that still comes, the token it ends with, and the error that ends it."""
    text, index = "", 0
    try:
        async for part in parts:
            text, index = text + part.text, part.token_index
    except SegcoreError as error:
        return text, index, error
    return text, index, None


@pytest_asyncio.fixture
async def undisturbed(replica: Callable[..., Sessions], tmp_path: Path) -> Callable[..., object]:
    """The text that a session gives which nothing disturbs: its document, an answer, and a second one."""

    async def texts(params: SamplingParams) -> list[str]:
        alone = replica(sessions=str(tmp_path / f"{uuid.uuid4().hex}.sqlite"), past_shared=None)
        await alone.create("", "s")
        await upload(alone)
        return [await ask(alone, params=params), await ask(alone, params=params)]

    return texts


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(loop: Loop, model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineDeployment]:
    """What one replica runs, without Ray."""
    folder = tmp_path_factory.mktemp("engine")
    config = ServeConfig(
        model=str(model_directory),
        dtype="float32",
        device="cpu",
        threads=1,
        segment=SERVED_SEGMENT,
        chunk_tokens=64,
        past_directory=folder / "past-kv",
        sessions=str(folder / "sessions.sqlite"),
        max_sessions=8,
        max_session_tokens=4000,
        max_document_bytes=10_000,
        max_data_bytes=4096,
        window_bytes=1024,
    )

    async def make() -> EngineDeployment:
        return EngineDeployment(config)

    made = loop.call(make())
    yield made
    loop.call(made._sessions.drain())
    made._engine.check_integrity()
    loop.call(made.end())


@pytest.fixture(scope="module")
def front(loop: Loop, engine: EngineDeployment) -> Iterator[Callable[..., RunningFront]]:
    """Makes fronts before it; changes are of the configuration."""
    made: list[RunningFront] = []

    def make(**changes: object) -> RunningFront:
        made.append(RunningFront(loop, engine, engine._config.model_copy(update=changes)))
        return made[-1]

    yield make
    for one in made:
        one.close()
