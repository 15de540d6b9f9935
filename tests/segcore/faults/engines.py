"""A stream whose past must lie in tiers, and how it is read."""

from __future__ import annotations

from pathlib import Path

import torch

from segcore.engine.engine import Engine
from tests.conftest import VOCABULARY
from tests.segcore import engines
from tests.segcore.engines import SECONDS

STREAM = torch.randint(0, VOCABULARY, (105,), generator=torch.Generator().manual_seed(5)).tolist()
KV_BYTES = 16 * 4 * 2 * 8 * 8  # tokens x cells x (keys, values) x dimensions x fp64
# Host memory for two blocks or so: most of the stream's past must be elsewhere.
LITTLE = 6 * KV_BYTES
EVERY_TOKEN = 24


def read(engine: Engine, session: str = "s", **options: str) -> None:
    """A session that has read the stream."""
    engine.open(session, **options)
    engine.append(session, STREAM)
    engine.flush(session).result(SECONDS)


def answer(engine: Engine, session: str = "s", count: int = EVERY_TOKEN, **params: object) -> list[int]:
    """Greedy tokens over more than a segment, so that several choices are made."""
    engine.mark(session)
    return engines.answer(engine, session, count, **params)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def settled(engine: Engine) -> None:
    """Wait until everything is written."""
    engine.check_integrity()
