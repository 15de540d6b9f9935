"""Which code made the items and judged the answers: results of different code are never put together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("segcore/tasks", "segcore/turns.py", "services/evaluation/scores.py", "services/evaluation/tasks")


@lru_cache(maxsize=1)
def code_digest() -> str:
    """A hash of the sources of tasks and scores."""
    made = hashlib.blake2b(digest_size=8)
    for path in _files():
        made.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return made.hexdigest()


def _files() -> Iterator[Path]:
    for name in SOURCES:
        path = ROOT / name
        yield from [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".py", ".yaml"))
