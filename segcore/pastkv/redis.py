"""Blocks in Redis: a shared tier for what is small enough to travel often.

A block is one string, set by one command, so it is there whole or not at all; reads ask for the
ranges that they need.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from segcore.errors import BlockDamaged, BlockMissing, ConfigError, StorageFull, TierUnavailable
from segcore.pastkv.base import Block, BlockHead
from segcore.pastkv.format import BlockFormat, ReadRanges

if TYPE_CHECKING:
    from redis import Redis

# A server that doesn't answer in this time counts as gone; the engine goes on without it. A block must travel in it.
TIMEOUT_S = 2.0
# Redis refuses longer strings.
MAX_VALUE_BYTES = 512 * 2**20


class RedisTier:
    """A `Tier` on a Redis server. Its memory limit and eviction are the server's own; what it drops is run again.

    lifetime_s: a block that nobody reads for so long expires; None: never.
    """

    name = "shared"

    def __init__(self, url: str, blocks: BlockFormat, lifetime_s: int | None) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise ConfigError("a Redis tier needs the package redis: pip install segcore[redis]") from error
        self._format, self._lifetime_s = blocks, lifetime_s
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        try:
            self._redis: Redis = redis.Redis.from_url(
                url,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                # A connection that broke while idle is made anew, at once; a time-out isn't waited for twice.
                retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            )
        except ValueError as error:
            raise ConfigError(f"shared isn't the address of a Redis server: {error}") from error  # it can hold a secret

    @property
    def used_bytes(self) -> int:
        """Of what this process put there and hasn't missed yet."""
        with self._lock:
            return sum(self._sizes.values())

    @property
    def keys(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._sizes)

    def put(self, block: Block, spare: Iterable[str] = ()) -> None:
        """`spare` has no say here: the server evicts, and others may need what this process doesn't."""
        if self.holds(block.key):
            if self._lifetime_s is not None:
                with self._answers():
                    self._redis.expire(_name(block.key), self._lifetime_s)
            return
        data = b"".join(self._format.encode(block))
        if len(data) > MAX_VALUE_BYTES:
            raise StorageFull(f"a block of {len(data)} bytes is too large for Redis; use a shared directory")
        with self._answers():
            self._redis.set(_name(block.key), data, ex=self._lifetime_s)
        with self._lock:
            self._sizes[block.key] = block.nbytes

    def rows(self, key: str, rows_n: Tensor) -> Tensor:
        return self._format.rows(key, self._reader(key), rows_n)

    def head(self, key: str, *, boundary: bool = True) -> BlockHead:
        return self._format.head(key, self._reader(key), boundary=boundary)

    def holds(self, key: str) -> bool:
        with self._answers():
            return bool(self._redis.exists(_name(key)))

    def delete(self, key: str) -> None:
        self._forget(key)
        with self._answers():
            self._redis.delete(_name(key))

    def close(self) -> None:
        """Close the connections; shared blocks stay."""
        self._redis.close()

    def _forget(self, key: str) -> None:
        with self._lock:
            self._sizes.pop(key, None)

    def _reader(self, key: str) -> ReadRanges:
        def read(ranges: Sequence[tuple[int, int]]) -> list[bytes]:
            """All in one round trip."""
            with self._answers(), self._redis.pipeline(transaction=False) as pipe:
                for start, stop in ranges:
                    pipe.getrange(_name(key), start, stop - 1)
                if self._lifetime_s is not None:
                    pipe.expire(_name(key), self._lifetime_s)
                parts: list[bytes] = pipe.execute()[: len(ranges)]
            if ranges and ranges[0][0] == 0 and not parts[0]:
                self._forget(key)
                raise BlockMissing(f"block {key} isn't in Redis")
            return parts

        return read

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """The server's errors as ours."""
        import redis

        try:
            yield
        except redis.OutOfMemoryError as error:
            raise StorageFull(f"Redis is full: {error}") from error
        except (redis.RedisError, OSError) as error:
            if "WRONGTYPE" in str(error):
                raise BlockDamaged(f"something else stands in a block's place: {error}") from error
            raise TierUnavailable(f"Redis doesn't answer: {error}") from error


def _name(key: str) -> str:
    return f"segcore:{key}"
