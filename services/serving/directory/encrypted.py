"""A directory whose values are encrypted: records and logs, with keys of each tenant's own.

Names, times, sizes and numbers stay as they are, for the directory works by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from segcore.errors import FailedPrecondition
from services.serving.directory.base import Directory, Lease, Name, Stored
from services.serving.encryption import Keys


class EncryptedDirectory:
    """A `Directory` before another one; what that one holds must be encrypted.

    Beside what directories raise, all that read or write values raise FailedPrecondition where a key is missing.
    """

    def __init__(self, inner: Directory, keys: Keys) -> None:
        self._inner, self._keys = inner, keys
        self.renew, self.release, self.names, self.close = inner.renew, inner.release, inner.names, inner.close

    def create(self, name: Name, record: bytes, entries: Iterable[bytes] = (), *, ttl_s: float | None = None) -> int:
        sealed = (self._seal(name, "entry", entry) for entry in entries)
        return self._inner.create(name, self._seal(name, "record", record), sealed, ttl_s=ttl_s)

    def read(self, name: Name) -> Stored | None:
        stored = self._inner.read(name)
        return None if stored is None else self._unsealed(name, stored)

    def log(self, name: Name, first: int = 0, stop: int | None = None) -> Iterator[bytes]:
        return (self._keys.unseal(_bound(name, "entry"), entry) for entry in self._inner.log(name, first, stop))

    def claim(self, name: Name, owner: str, lease_s: float) -> tuple[Lease, Stored]:
        lease, stored = self._inner.claim(name, owner, lease_s)
        try:
            return lease, self._unsealed(name, stored)
        except Exception:
            self._inner.release(lease)
            raise

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
        sealed = [self._seal(lease.name, "entry", entry) for entry in entries]
        record = None if record is None else self._seal(lease.name, "record", record)
        return self._inner.commit(lease, generation, sealed, record=record, keep=keep, ttl_s=ttl_s)

    def delete(self, name: Name, remnant: bytes, keep_s: float, generation: int | None = None) -> None:
        try:
            sealed = self._seal(name, "record", remnant)
        except FailedPrecondition:  # a tenant without a key: nothing of it can be kept
            sealed, keep_s = b"", 0.0
        self._inner.delete(name, sealed, keep_s, generation)

    def _seal(self, name: Name, kind: str, value: bytes) -> bytes:
        return self._keys.seal(name.owner, _bound(name, kind), value)

    def _unsealed(self, name: Name, stored: Stored) -> Stored:
        return replace(stored, record=self._keys.unseal(_bound(name, "record"), stored.record))


def _bound(name: Name, kind: str) -> str:
    """What an encrypted value is bound to: it can't stand for another session's, or for another kind."""
    return f"{kind} {name.tenant}/{name.session_id}"
