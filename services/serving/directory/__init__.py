"""Directories of sessions: one contract, and a file for each kind."""

from __future__ import annotations

from pathlib import Path

from segcore.errors import ConfigError
from services.serving.directory.base import Directory


def open_directory(where: str, encryption_keys: Path | None = None) -> Directory:
    """The directory at a Redis server's address (redis://...), or in a SQLite file.

    encryption_keys: the file of the keys that its values are encrypted with. Raises ConfigError.
    """
    if encryption_keys is None:
        return _bare_directory(where)
    from services.serving.directory.encrypted import EncryptedDirectory
    from services.serving.encryption import Keys

    return EncryptedDirectory(_bare_directory(where), Keys.read(encryption_keys))


def _bare_directory(where: str) -> Directory:
    if where.startswith(("redis://", "rediss://", "unix://")):
        from services.serving.directory.redis import RedisDirectory

        return RedisDirectory(where)
    if "://" in where:
        raise ConfigError(f"sessions={where!r} must be a file, or the address of a Redis server (redis://...)")
    from services.serving.directory.sqlite import SqliteDirectory

    return SqliteDirectory(Path(where))
