"""A real service: local Ray, Serve's gRPC proxy, two engine replicas of a tiny random model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.serving.client import Client
from services.serving.config import ServeConfig
from services.serving.local import local_service
from tests.conftest import SERVED_SEGMENT
from tests.services.serving.fronts import free_port

MAX_DOCUMENT_BYTES = 10_000
MAX_SESSION_TOKENS = 14_000


@pytest.fixture(scope="package")
def config(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    return ServeConfig(
        model=str(model_directory),
        dtype="float32",
        device="cpu",
        threads=1,
        segment=SERVED_SEGMENT,
        chunk_tokens=64,
        replicas=2,
        grpc_port=0,
        http_port=free_port(),
        serve_grpc_port=free_port(),
        fronts=2,
        past_directory=tmp_path_factory.mktemp("past-kv"),
        past_shared=str(tmp_path_factory.mktemp("shared")),
        sessions=str(tmp_path_factory.mktemp("sessions") / "sessions.sqlite"),
        lease_s=2.0,
        max_sessions=12,
        max_session_tokens=MAX_SESSION_TOKENS,
        max_document_bytes=MAX_DOCUMENT_BYTES,
        max_data_bytes=64 * 1024,
    )


@pytest.fixture(scope="package")
def address(config: ServeConfig) -> Iterator[str]:
    with local_service(config, most_replicas=3) as where:
        yield where


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as made:
        yield made


@pytest.fixture
def session(client: Client) -> Iterator[str]:
    """An empty session, gone at the test's end."""
    session_id = client.create_session().session_id
    yield session_id
    client.delete_session(session_id)
