"""Who may call, and how much: tenants from a file, known by bearer tokens of which the file has hashes only.

    tenants:
      - name: acme
        tokens: [9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08]   # `segcore token` makes one
        sessions: 100
        requests_per_minute: 600

The file is read again when it changes, so tokens can be renewed while the service runs.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from segcore.errors import Busy, ConfigError, Unauthenticated
from services.config_file import read_config

log = logging.getLogger(__name__)

_BEARER = re.compile(r"Bearer +([!-~]{1,512})", re.IGNORECASE)
_REREAD_SECONDS = 1.0

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Limit = Annotated[int, Field(ge=1)]


class Tenant(BaseModel):
    """One tenant. Sessions and past KV of different tenants never meet.

    tokens: SHA-256 of each bearer token, in hexadecimal. A limit that is None doesn't hold. sessions: at once. The
    others are per minute, shared between the fronts: requests that begin, bytes that are uploaded, and tokens that are
    run, those of documents, questions and answers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{0,64}$")]
    tokens: tuple[Sha256, ...] = ()
    sessions: Limit | None = None
    requests_per_minute: Limit | None = None
    bytes_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None


OPEN = Tenant(name="")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    tenants: tuple[Tenant, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> _File:
        names, tokens = [t.name for t in self.tenants], [token for t in self.tenants for token in t.tokens]
        if not all(t.name and t.tokens for t in self.tenants):
            raise ValueError("a tenant needs a name and a token")
        if len(set(names)) < len(names) or len(set(tokens)) < len(tokens):
            raise ValueError("two tenants have the same name, or the same token")
        return self


class Tenants:
    """The tenants of a file; without one, a single open tenant whom everybody is."""

    def __init__(self, path: Path | None) -> None:
        """Raises ConfigError for a file that can't be used."""
        self._path = path
        self._read_at, self._stamp = 0.0, 0
        self._tenants: tuple[Tenant, ...] = ()
        if path is not None:
            self._read(path)

    def authenticate(self, authorization: str | None) -> Tenant:
        """The tenant that a header `authorization: Bearer TOKEN` names. Raises Unauthenticated."""
        if self._path is None:
            return OPEN
        self._reread(self._path)
        match = _BEARER.fullmatch(authorization or "")
        if match is None:
            raise Unauthenticated("send a bearer token: authorization: Bearer TOKEN")
        presented = token_hash(match[1])
        # Every hash is compared, and in constant time: the time taken tells nothing about those that exist.
        found = [t for t in self._tenants for token in t.tokens if hmac.compare_digest(token, presented)]
        if not found:
            raise Unauthenticated("the bearer token isn't known here")
        return found[0]

    def _read(self, path: Path) -> None:
        try:
            self._stamp = path.stat().st_mtime_ns
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        self._tenants = read_config(path, _File).tenants

    def _reread(self, path: Path) -> None:
        """Follow the file; one that has become unusable leaves things as they were."""
        now = time.monotonic()
        if now - self._read_at < _REREAD_SECONDS:
            return
        self._read_at = now
        try:
            if path.stat().st_mtime_ns != self._stamp:
                self._read(path)
        except (OSError, ConfigError) as error:
            log.error("the tenants' file can't be read again, the old one stays in force: %s", error)


def new_token() -> str:
    """A bearer token: 256 random bits, so that a plain hash of it tells nothing."""
    return secrets.token_urlsafe(32)


def token_hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class Quotas:
    """What tenants have used of their limits per minute, at one of `fronts` fronts, each of which has its share."""

    def __init__(self, fronts: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._fronts, self._clock = fronts, clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def take(self, tenant: Tenant, kind: str, amount: int = 1) -> None:
        """Use `amount` of a limit: "requests", "bytes" or "tokens". Raises Busy, which says when to come again.

        The last that is let in may go beyond the limit; the next one waits until that is made up for.
        """
        bucket = self._bucket(tenant, kind)
        if bucket is None:
            return
        wait = bucket.wait(self._clock())
        if wait > 0:
            raise Busy(
                f"the limit of {bucket.limit} {kind} a minute is used up; try again in {wait:.1f} s",
                retry_after_s=f"{wait + 1e-3:.3f}",
            )
        bucket.level -= amount

    def charge(self, tenant: Tenant, kind: str, amount: int) -> None:
        """Count what has been used already; it is never refused."""
        bucket = self._bucket(tenant, kind)
        if bucket is not None:
            bucket.wait(self._clock())
            bucket.level -= amount

    def _bucket(self, tenant: Tenant, kind: str) -> _Bucket | None:
        limit: int | None = getattr(tenant, f"{kind}_per_minute")
        if limit is None:
            return None
        key = (tenant.name, kind)
        if key not in self._buckets or self._buckets[key].limit != limit:
            self._buckets[key] = _Bucket(limit, limit / self._fronts, self._clock())
        return self._buckets[key]


class _Bucket:
    """A token bucket that holds a minute's worth, `share` of `limit`, and may be in debt."""

    def __init__(self, limit: int, share: float, now: float) -> None:
        self.limit, self.level = limit, share
        self._share, self._at = share, now

    def wait(self, now: float) -> float:
        """Seconds until it holds anything; 0 if it does."""
        self.level = min(self._share, self.level + (now - self._at) * self._share / 60)
        self._at = now
        return 0.0 if self.level > 0 else (1e-3 - self.level) * 60 / self._share
