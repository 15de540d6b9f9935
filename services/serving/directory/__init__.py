"""Directories of sessions: one contract, and a file for each kind."""

from __future__ import annotations

from pathlib import Path

from segcore.errors import ConfigError
from services.serving.directory.base import Directory


def open_directory(where: str) -> Directory:
    """The directory at a Redis server's address (redis://...), or in a SQLite file. Raises ConfigError."""
    if where.startswith(("redis://", "rediss://", "unix://")):
        from services.serving.directory.redis import RedisDirectory

        return RedisDirectory(where)
    if "://" in where:
        raise ConfigError(f"sessions={where!r} must be a file, or the address of a Redis server (redis://...)")
    from services.serving.directory.sqlite import SqliteDirectory

    return SqliteDirectory(Path(where))
