"""What tests of the manager of past KV share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from segcore.config import CacheConfig
from segcore.pastkv.directory import DirectoryTier
from segcore.pastkv.manager import PastKVManager
from tests.segcore.blocks import BLOCK_BYTES


@pytest.fixture
def make_past() -> Iterator[Callable[..., PastKVManager]]:
    made: list[PastKVManager] = []

    def make(*, blocks: float = 100, **options: object) -> PastKVManager:
        config = CacheConfig(host_bytes=int(blocks * BLOCK_BYTES), **options)  # type: ignore[arg-type]
        made.append(PastKVManager(config))
        return made[-1]

    yield make
    for past in made:
        past.check_integrity()
        past.close()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of blocks whose rows were read from a directory."""
    keys: list[str] = []
    rows = DirectoryTier.rows

    def counted(tier, key, rows_n):
        keys.append(key)
        return rows(tier, key, rows_n)

    monkeypatch.setattr(DirectoryTier, "rows", counted)
    return keys
