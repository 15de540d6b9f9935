"""Where sessions are kept: all that any replica needs to continue one, and who may write it just now.

Of each session a directory holds a record and a log of entries, bytes that it doesn't look into. Whoever writes first
claims a lease. Its fencing token grows each time the lease changes hands, and every write names it, so that a replica
that slept through the end of its lease can't write any more. Leases end by the directory's clock, so the clocks of
replicas don't matter. The lease itself is a courtesy: it keeps others from interrupting long work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from segcore.errors import Conflict, LeaseLost, NotFound, SegcoreError, Unavailable

# Calls of no session are kept under a tenant's name with this behind it, which isn't any tenant's, and never listed.
_REQUESTS = ".requests"


class Name(NamedTuple):
    """A session's: tenants share no names. Each part has up to 64 letters, digits, '-' or '_'."""

    tenant: str
    session_id: str

    @property
    def owner(self) -> str:
        """The tenant whose keys encrypt it."""
        return self.tenant.removesuffix(_REQUESTS)

    @property
    def listed(self) -> bool:
        """Whether `names` ever asks for it."""
        return not self.tenant.endswith(_REQUESTS)


def request_name(tenant: str, request_id: str) -> Name:
    """Under which a call of no session is remembered."""
    return Name(tenant + _REQUESTS, request_id)


@dataclass(frozen=True)
class Lease:
    """The right of `owner`, a replica, to write a session; token: the fencing token, of this name ever growing."""

    name: Name
    owner: str
    token: int


@dataclass(frozen=True)
class Stored:
    """What is kept of a session. generation: how many writes there were. entries: of the log.

    deleted: this is what a deletion left, for a while.
    """

    record: bytes
    generation: int
    entries: int
    deleted: bool = False


class Directory(Protocol):
    """Every method is atomic and lasting once it returns, and may be called from any thread.

    All raise Unavailable if the directory can't be reached: what was to be written may then be there or not. Those that
    write raise StorageFull. A session whose time to live is over is absent. ttl_s: None is for ever.
    """

    def create(self, name: Name, record: bytes, entries: Iterable[bytes] = (), *, ttl_s: float | None = None) -> int:
        """Begin a session; returns its generation. Raises AlreadyExists. A deleted one's name is free."""
        ...

    def read(self, name: Name) -> Stored | None:
        """What is kept, or what a deletion left."""
        ...

    def log(self, name: Name, first: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The entries [first, stop) of the log, as far as they are there."""
        ...

    def claim(self, name: Name, owner: str, lease_s: float) -> tuple[Lease, Stored]:
        """Take the lease if it is free, over, or the owner's already: then its token stays the same.

        Raises NotFound, and Unavailable while another owner's lasts: that one is told by `renew`.
        """
        ...

    def renew(self, lease: Lease, lease_s: float) -> bool:
        """Let the lease last `lease_s` from now; whether another replica waits for it. Raises LeaseLost."""
        ...

    def release(self, lease: Lease) -> None:
        """Let others claim the session at once. No effect if the lease is lost."""
        ...

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
        """Write all of it or nothing; returns the new generation. Its time to live begins anew.

        generation: the last one that the writer knows. record: replaces what is kept, if given. keep: how many entries
        of the log stay before new ones are added; None: all. Raises LeaseLost if another replica has claimed the
        session, or if what is stored isn't what the writer last knew.
        """
        ...

    def delete(self, name: Name, remnant: bytes, keep_s: float, generation: int | None = None) -> None:
        """Leave `remnant` for `keep_s` in place of a session, whoever holds it.

        generation: the only one that may be deleted. Raises NotFound, Conflict.
        """
        ...

    def names(self, tenant: str, after: str, most: int) -> list[str]:
        """Ids of a tenant's sessions in their order, from the first that comes after `after`, at most so many."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


def absent(name: Name) -> NotFound:
    """What is raised for a session that isn't there, or another tenant's."""
    return NotFound(f"session {name.session_id!r} doesn't exist; create it first", session_id=name.session_id)


def changed(name: Name, generation: int) -> Conflict:
    """What is raised for a session that isn't at the generation that was expected."""
    return Conflict(
        f"session {name.session_id!r} has changed: it is at generation {generation}; read it again",
        generation=generation,
    )


def held(name: Name, seconds: float) -> SegcoreError:
    """What is raised while another replica's lease lasts."""
    return Unavailable(
        f"session {name.session_id!r} is being worked on by another replica; try again", retry_after_s=f"{seconds:.3f}"
    )


def lost(lease: Lease) -> LeaseLost:
    """What is raised for a write under a lease that was lost."""
    return LeaseLost(f"session {lease.name.session_id!r} has gone to another replica; try again", retry_after_s="0.1")
