"""Sessions in a SQLite file: the embedded default, for replicas on one machine.

What is written survives the death of any process at once. When the machine itself fails, the last moments' writes may
be gone; the file is never torn.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from segcore.errors import AlreadyExists, ConfigError, StorageFull, Unavailable
from services.serving.directory.base import Lease, Name, Stored, absent, changed, held, lost

# How long a write waits for other processes' writes.
TIMEOUT_S = 5.0
_PAGE = 64
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
  tenant TEXT, id TEXT, record BLOB, generation INTEGER, deleted INTEGER DEFAULT 0, expires REAL,
  owner TEXT DEFAULT '', token INTEGER, until REAL DEFAULT 0, wanted INTEGER DEFAULT 0, PRIMARY KEY (tenant, id));
CREATE TABLE IF NOT EXISTS log (
  tenant TEXT, id TEXT, position INTEGER, entry BLOB, PRIMARY KEY (tenant, id, position),
  FOREIGN KEY (tenant, id) REFERENCES sessions ON DELETE CASCADE);
CREATE INDEX IF NOT EXISTS expiring ON sessions (expires) WHERE expires IS NOT NULL;
"""


class SqliteDirectory:
    """A `Directory` in a file. clock: seconds; all replicas share the machine's."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._lock = clock, threading.RLock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=TIMEOUT_S, isolation_level=None, check_same_thread=False)
            # NORMAL: a write-ahead log is synchronised with the disk when it is full, not at every write.
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            self._db.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"sessions can't be kept in {path}: {error}") from error

    def create(self, name: Name, record: bytes, entries: Iterable[bytes] = (), *, ttl_s: float | None = None) -> int:
        with self._writing() as db:
            db.execute("DELETE FROM sessions WHERE expires <= ?", (self._clock(),))
            row = self._row(name)
            if row is not None and not row["deleted"]:
                raise AlreadyExists(f"session {name.session_id!r} already exists; choose another id")
            # Tokens begin with the clock, so that those of an earlier session of this name are smaller.
            token = max(int(self._clock() * 1e6), 0 if row is None else row["token"] + 1)
            db.execute("DELETE FROM sessions WHERE tenant = ? AND id = ?", name)
            db.execute(
                "INSERT INTO sessions (tenant, id, record, generation, expires, token) VALUES (?, ?, ?, 1, ?, ?)",
                (*name, record, self._end(ttl_s), token),
            )
            self._extend(name, entries)
        return 1

    def read(self, name: Name) -> Stored | None:
        with self._reading():
            row = self._row(name)
            return None if row is None else self._stored(name, row)

    def log(self, name: Name, first: int = 0, stop: int | None = None) -> Iterator[bytes]:
        stop = 2**62 if stop is None else stop
        query = "SELECT entry FROM log WHERE tenant = ? AND id = ? AND position >= ? AND position < ? ORDER BY position"
        while first < stop:
            with self._reading() as db:
                page = db.execute(f"{query} LIMIT {_PAGE}", (*name, first, stop)).fetchall()
            yield from (row["entry"] for row in page)
            if len(page) < _PAGE:
                return
            first += len(page)

    def claim(self, name: Name, owner: str, lease_s: float) -> tuple[Lease, Stored]:
        with self._writing() as db:
            row, now = self._live_row(name), self._clock()
            taken = row["owner"] != owner
            if taken and row["until"] > now:
                db.execute("UPDATE sessions SET wanted = 1 WHERE tenant = ? AND id = ?", name)
                db.execute("COMMIT")
                raise held(name, row["until"] - now)
            token = row["token"] + taken
            db.execute(
                "UPDATE sessions SET owner = ?, token = ?, until = ?, wanted = 0 WHERE tenant = ? AND id = ?",
                (owner, token, now + lease_s, *name),
            )
            return Lease(name, owner, token), self._stored(name, row)

    def renew(self, lease: Lease, lease_s: float) -> bool:
        with self._writing() as db:
            row = self._own_row(lease)
            until = self._clock() + lease_s
            db.execute("UPDATE sessions SET until = ? WHERE tenant = ? AND id = ?", (until, *lease.name))
            return bool(row["wanted"])

    def release(self, lease: Lease) -> None:
        with self._writing() as db:
            db.execute(
                "UPDATE sessions SET until = 0, wanted = 0 WHERE tenant = ? AND id = ? AND owner = ? AND token = ?",
                (*lease.name, lease.owner, lease.token),
            )

    def commit(
        self,
        lease: Lease,
        generation: int,
        entries: Sequence[bytes] = (),
        *,
        record: bytes | None = None,
        keep: int | None = None,
        ttl_s: float | None = None,
    ) -> int:
        with self._writing() as db:
            row = self._own_row(lease)
            if row["generation"] != generation:
                raise lost(lease)
            db.execute(
                "UPDATE sessions SET record = ?, generation = ?, expires = ? WHERE tenant = ? AND id = ?",
                (row["record"] if record is None else record, generation + 1, self._end(ttl_s), *lease.name),
            )
            if keep is not None:
                db.execute("DELETE FROM log WHERE tenant = ? AND id = ? AND position >= ?", (*lease.name, keep))
            self._extend(lease.name, entries)
        return generation + 1

    def delete(self, name: Name, remnant: bytes, keep_s: float, generation: int | None = None) -> None:
        with self._writing() as db:
            row = self._live_row(name)
            if generation is not None and row["generation"] != generation:
                raise changed(name, row["generation"])
            db.execute("DELETE FROM log WHERE tenant = ? AND id = ?", name)
            db.execute(
                "UPDATE sessions SET deleted = 1, record = ?, owner = '', until = 0, expires = ?"
                " WHERE tenant = ? AND id = ?",
                (remnant, self._end(keep_s), *name),
            )

    def names(self, tenant: str, after: str, most: int) -> list[str]:
        query = (
            "SELECT id FROM sessions WHERE tenant = ? AND id > ? AND NOT deleted"
            " AND (expires IS NULL OR expires > ?) ORDER BY id LIMIT ?"
        )
        with self._reading() as db:
            return [row["id"] for row in db.execute(query, (tenant, after, self._clock(), most))]

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _end(self, seconds: float | None) -> float | None:
        return None if seconds is None else self._clock() + seconds

    def _row(self, name: Name) -> sqlite3.Row | None:
        query = "SELECT * FROM sessions WHERE tenant = ? AND id = ? AND (expires IS NULL OR expires > ?)"
        row: sqlite3.Row | None = self._db.execute(query, (*name, self._clock())).fetchone()
        return row

    def _live_row(self, name: Name) -> sqlite3.Row:
        row = self._row(name)
        if row is None or row["deleted"]:
            raise absent(name)
        return row

    def _own_row(self, lease: Lease) -> sqlite3.Row:
        row = self._row(lease.name)
        if row is None or (row["owner"], row["token"]) != (lease.owner, lease.token):
            raise lost(lease)
        return row

    def _entries(self, name: Name) -> int:
        query = "SELECT COALESCE(MAX(position) + 1, 0) FROM log WHERE tenant = ? AND id = ?"
        return int(self._db.execute(query, name).fetchone()[0])

    def _extend(self, name: Name, entries: Iterable[bytes]) -> None:
        rows = ((*name, position, entry) for position, entry in enumerate(entries, self._entries(name)))
        self._db.executemany("INSERT INTO log VALUES (?, ?, ?, ?)", rows)

    def _stored(self, name: Name, row: sqlite3.Row) -> Stored:
        return Stored(row["record"], row["generation"], self._entries(name), bool(row["deleted"]))

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _errors():
            self._db.row_factory = sqlite3.Row
            yield self._db

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction; what is raised within undoes it, unless it was committed by then."""
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL":
            raise StorageFull("the disk that holds the sessions is full") from error
        raise Unavailable(f"the sessions' file can't be used just now: {error}", retry_after_s="1") from error
