"""Blocks in Redis: a shared tier for what is small enough to travel often.

A block is two strings in one hash slot, its head and its bulk, set in one transaction: both are there or neither is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from segcore.errors import BlockDamaged, BlockMissing, ConfigError, StorageFull, TierUnavailable
from segcore.pastkv.base import Block, BlockHead
from segcore.pastkv.format import BlockFormat

if TYPE_CHECKING:
    from redis import Redis

# A server that doesn't answer in this time counts as gone; the engine goes on without it.
TIMEOUT_S = 2.0
# Redis refuses longer strings.
MAX_VALUE_BYTES = 512 * 2**20
PREFIX_BYTES = 8  # of a safetensors file: the length of its header


class RedisTier:
    """A `Tier` on a Redis server. Its memory limit and eviction are the server's own; what it drops is run again.

    lifetime_s: a block that nobody reads for so long expires; None: never.
    """

    name = "shared"

    def __init__(self, url: str, blocks: BlockFormat, lifetime_s: int | None) -> None:
        try:
            import redis
        except ImportError as error:
            raise ConfigError("a Redis tier needs the package redis: pip install segcore[redis]") from error
        self._format, self._lifetime_s = blocks, lifetime_s
        self._sizes: dict[str, int] = {}
        try:
            self._redis: Redis = redis.Redis.from_url(
                url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, protocol=3
            )
        except ValueError as error:
            raise ConfigError(f"{url!r} isn't the address of a Redis server: {error}") from error

    @property
    def used_bytes(self) -> int:
        return sum(self._sizes.values())

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._sizes)

    def put(self, block: Block) -> None:
        if self.holds(block.key):
            self._touch(block.key)
            return
        tensors, metadata = self._format.encode(block)
        bulk = save({"kv": tensors.pop("kv")})
        if len(bulk) > MAX_VALUE_BYTES:
            raise StorageFull(f"a block of {len(bulk)} bytes is too large for Redis; use a shared directory")
        with self._answers(), self._redis.pipeline(transaction=True) as pipe:
            pipe.set(_name(block.key, "kv"), bulk, ex=self._lifetime_s)
            pipe.set(_name(block.key, "head"), save(tensors, metadata), ex=self._lifetime_s)
            pipe.execute()
        self._sizes[block.key] = block.nbytes

    def rows(self, key: str, rows_n: Tensor) -> Tensor:
        tensors, metadata = self._read_head(key)
        bulk = _name(key, "kv")
        with self._answers():
            prefix = self._range(bulk, 0, PREFIX_BYTES - 1)
            if len(prefix) < PREFIX_BYTES:
                raise BlockMissing(f"block {key} isn't in Redis")
            start = PREFIX_BYTES + int.from_bytes(prefix, "little")
            header = json.loads(self._range(bulk, PREFIX_BYTES, start - 1))["kv"]

            def read_kv(tokens: slice) -> Tensor:
                """Some tokens of the bulk: its bytes under a header of their own."""
                stop = min(tokens.stop, header["shape"][0])
                row_bytes = header["data_offsets"][1] // header["shape"][0]
                data = self._range(bulk, start + tokens.start * row_bytes, start + stop * row_bytes - 1)
                shape = [stop - tokens.start, *header["shape"][1:]]
                part = json.dumps({"kv": header | {"shape": shape, "data_offsets": [0, len(data)]}}).encode()
                return load(len(part).to_bytes(PREFIX_BYTES, "little") + part + data)["kv"]

            rows = self._format.rows(key, metadata, tensors.__getitem__, read_kv, rows_n)
        self._touch(key)
        return rows

    def head(self, key: str) -> BlockHead:
        tensors, metadata = self._read_head(key)
        with self._answers():
            return self._format.head(key, metadata, tensors.__getitem__)

    def holds(self, key: str) -> bool:
        with self._answers():
            return int(self._redis.exists(_name(key, "head"), _name(key, "kv"))) == 2

    def delete(self, key: str) -> None:
        self._sizes.pop(key, None)
        with self._answers():
            self._redis.delete(_name(key, "head"), _name(key, "kv"))

    def evict(self, spare: Iterable[str], needed_bytes: int) -> None:
        """Nothing: others may need what this process doesn't; the server evicts."""

    def close(self) -> None:
        """Close the connections; shared blocks stay."""
        self._redis.close()

    def _read_head(self, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        with self._answers():
            data = cast("bytes | None", self._redis.get(_name(key, "head")))
            if data is None:
                raise BlockMissing(f"block {key} isn't in Redis")
            length = int.from_bytes(data[:PREFIX_BYTES], "little")
            metadata = json.loads(data[PREFIX_BYTES : PREFIX_BYTES + length]).get("__metadata__")
            return load(data), metadata

    def _range(self, name: str, first: int, last: int) -> bytes:
        return cast(bytes, self._redis.getrange(name, first, last))

    def _touch(self, key: str) -> None:
        if self._lifetime_s is not None:
            with self._answers(), self._redis.pipeline(transaction=False) as pipe:
                for part in ("head", "kv"):
                    pipe.expire(_name(key, part), self._lifetime_s)
                pipe.execute()

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """The server's and the parser's errors as ours."""
        import redis

        try:
            yield
        except redis.OutOfMemoryError as error:
            raise StorageFull(f"Redis is full: {error}") from error
        except redis.RedisError as error:
            raise TierUnavailable(f"Redis doesn't answer: {error}") from error
        except (SafetensorError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
            raise BlockDamaged(f"a block in Redis can't be read: {error}") from error


def _name(key: str, part: str) -> str:
    """In a cluster, what stands in braces decides the slot."""
    return f"segcore:{{{key}}}:{part}"
