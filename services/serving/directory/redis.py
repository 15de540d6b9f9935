"""Sessions in Redis: for replicas anywhere.

A session's keys share a hash tag, so that they lie in one slot of a cluster, and every write is one script. Let the
server keep an append-only file, and evict nothing (`maxmemory-policy noeviction`): what it loses is lost.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from segcore.errors import AlreadyExists, ConfigError, StorageFull, Unavailable
from services.serving.directory.base import Lease, Name, Stored, absent, changed, held, lost

# A server that doesn't answer in this time counts as gone.
TIMEOUT_S = 2.0
_PAGE = 64
# A new session's log is put aside in pieces before it shows.
_PIECE_BYTES = 2**20
_ASIDE_S = 600

_NOW = "local t = redis.call('TIME') local now_us = t[1] * 1000000 + t[2] local now = math.floor(now_us / 1000)\n"
_OWN = """
local f = redis.call('HMGET', KEYS[1], 'owner', 'token', 'generation', 'wanted')
if f[1] ~= ARGV[1] or f[2] ~= ARGV[2] then return -1 end
"""
# Scripts; KEYS: the session, its log. Numbers beyond 14 digits are written by format, or Lua would round them.
_CREATE = (
    _NOW
    + """
local f = redis.call('HMGET', KEYS[1], 'record', 'deleted', 'token')
if f[1] and not f[2] then return 0 end
local token = now_us
if f[3] and tonumber(f[3]) >= token then token = tonumber(f[3]) + 1 end
redis.call('DEL', KEYS[1], KEYS[2])
if redis.call('EXISTS', KEYS[3]) == 1 then
  redis.call('RENAME', KEYS[3], KEYS[2])
  redis.call('PERSIST', KEYS[2])
end
redis.call('HSET', KEYS[1], 'record', ARGV[1], 'generation', 1, 'owner', '', 'until', 0,
  'token', string.format('%.0f', token))
if ARGV[2] ~= '' then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  redis.call('PEXPIRE', KEYS[2], ARGV[2])
end
return 1
"""
)
_CLAIM = (
    _NOW
    + """
local f = redis.call('HMGET', KEYS[1], 'record', 'deleted', 'owner', 'until')
if not f[1] or f[2] then return {0} end
if f[3] ~= ARGV[1] then
  if tonumber(f[4]) > now then
    redis.call('HSET', KEYS[1], 'wanted', 1)
    return {1, tonumber(f[4]) - now}
  end
  redis.call('HINCRBY', KEYS[1], 'token', 1)
end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'until', string.format('%.0f', now + ARGV[2]))
redis.call('HDEL', KEYS[1], 'wanted')
return {2, redis.call('HGET', KEYS[1], 'token'), f[1], redis.call('HGET', KEYS[1], 'generation'),
  redis.call('LLEN', KEYS[2])}
"""
)
_RENEW = (
    _NOW
    + _OWN
    + """
redis.call('HSET', KEYS[1], 'until', string.format('%.0f', now + ARGV[3]))
if f[4] then return 1 end
return 0
"""
)
_RELEASE = (
    _OWN
    + """
redis.call('HSET', KEYS[1], 'until', 0)
redis.call('HDEL', KEYS[1], 'wanted')
return 1
"""
)
_COMMIT = (
    _OWN
    + """
if f[3] ~= ARGV[3] then return -1 end
local keep = tonumber(ARGV[6])
if keep == 0 then redis.call('DEL', KEYS[2]) elseif keep > 0 then redis.call('LTRIM', KEYS[2], 0, keep - 1) end
for i = 7, #ARGV do redis.call('RPUSH', KEYS[2], ARGV[i]) end
if ARGV[5] ~= '' then redis.call('HSET', KEYS[1], 'record', ARGV[5]) end
for i = 1, 2 do
  if ARGV[4] == '' then redis.call('PERSIST', KEYS[i]) else redis.call('PEXPIRE', KEYS[i], ARGV[4]) end
end
return redis.call('HINCRBY', KEYS[1], 'generation', 1)
"""
)
_DELETE = """
local f = redis.call('HMGET', KEYS[1], 'record', 'deleted', 'generation')
if not f[1] or f[2] then return -1 end
if ARGV[3] ~= '' and f[3] ~= ARGV[3] then return tonumber(f[3]) end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[1], 'record', ARGV[1], 'deleted', 1, 'owner', '', 'until', 0)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 0
"""


class RedisDirectory:
    """A `Directory` on a Redis server of version 6.2 or later."""

    def __init__(self, url: str) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise ConfigError("sessions in Redis need the package redis: pip install segcore[redis]") from error
        try:
            self._redis: Any = redis.Redis.from_url(
                url,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                # A connection that broke while idle is made anew, at once. A write may so be tried twice; the second
                # finds another generation, or the session there or gone, and says so.
                retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            )
        except ValueError as error:
            raise ConfigError(f"sessions isn't the address of a Redis server: {error}") from error  # may hold a secret
        scripts = {"create": _CREATE, "claim": _CLAIM, "renew": _RENEW, "release": _RELEASE, "commit": _COMMIT}
        self._scripts = {name: self._redis.register_script(s) for name, s in (scripts | {"delete": _DELETE}).items()}

    def create(self, name: Name, record: bytes, entries: Iterable[bytes] = (), *, ttl_s: float | None = None) -> int:
        aside = f"{_key(name)}:aside:{uuid.uuid4().hex}"
        with _errors():
            self._list(name)
            self._put_aside(aside, entries)
            made = self._scripts["create"](keys=[*_keys(name), aside], args=[record, _ms(ttl_s)])
            if not made:
                self._redis.delete(aside)
                raise AlreadyExists(f"session {name.session_id!r} already exists; choose another id")
            self._list(name)  # once more: a listing may have found a name without a session
        return 1

    def read(self, name: Name) -> Stored | None:
        with _errors(), self._redis.pipeline() as pipe:
            pipe.hmget(_key(name), "record", "generation", "deleted")
            pipe.llen(_log(name))
            (record, generation, deleted), entries = pipe.execute()
        return None if record is None else Stored(record, int(generation), entries, deleted is not None)

    def log(self, name: Name, first: int = 0, stop: int | None = None) -> Iterator[bytes]:
        stop = 2**62 if stop is None else stop
        while first < stop:
            with _errors():
                page = self._redis.lrange(_log(name), first, min(first + _PAGE, stop) - 1)
            yield from page
            if len(page) < _PAGE:
                return
            first += len(page)

    def claim(self, name: Name, owner: str, lease_s: float) -> tuple[Lease, Stored]:
        outcome, *found = self._run("claim", name, owner, _ms(lease_s))
        if outcome == 0:
            raise absent(name)
        if outcome == 1:
            raise held(name, found[0] / 1000)
        token, record, generation, entries = found
        return Lease(name, owner, int(token)), Stored(record, int(generation), entries)

    def renew(self, lease: Lease, lease_s: float) -> bool:
        outcome = self._run("renew", lease.name, lease.owner, lease.token, _ms(lease_s))
        if outcome < 0:
            raise lost(lease)
        return bool(outcome)

    def release(self, lease: Lease) -> None:
        self._run("release", lease.name, lease.owner, lease.token)

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
        settings = (generation, _ms(ttl_s), record or b"", -1 if keep is None else keep)
        outcome = self._run("commit", lease.name, lease.owner, lease.token, *settings, *entries)
        if outcome < 0:
            raise lost(lease)
        return int(outcome)

    def delete(self, name: Name, remnant: bytes, keep_s: float, generation: int | None = None) -> None:
        outcome = self._run("delete", name, remnant, _ms(keep_s), "" if generation is None else generation)
        if outcome < 0:
            raise absent(name)
        if outcome > 0:
            raise changed(name, outcome)
        with _errors():
            self._redis.zrem(_index(name.tenant), name.session_id)

    def names(self, tenant: str, after: str, most: int) -> list[str]:
        found: list[str] = []
        while len(found) < most:
            least = f"({after}" if after else "-"
            with _errors():
                page = [id.decode() for id in self._redis.zrangebylex(_index(tenant), least, "+", start=0, num=most)]
                with self._redis.pipeline(transaction=False) as pipe:
                    for session_id in page:
                        pipe.hmget(_key(Name(tenant, session_id)), "record", "deleted")
                    there = [record is not None and deleted is None for record, deleted in pipe.execute()]
                gone = [session_id for session_id, is_there in zip(page, there, strict=True) if not is_there]
                if gone:
                    self._redis.zrem(_index(tenant), *gone)
            found += [session_id for session_id, is_there in zip(page, there, strict=True) if is_there]
            if len(page) < most:
                break
            after = page[-1]
        return found[:most]

    def close(self) -> None:
        self._redis.close()

    def _run(self, script: str, name: Name, *args: str | float | bytes) -> Any:
        with _errors():
            return self._scripts[script](keys=_keys(name), args=list(args))

    def _list(self, name: Name) -> None:
        if name.listed:
            self._redis.zadd(_index(name.tenant), {name.session_id: 0})

    def _put_aside(self, key: str, entries: Iterable[bytes]) -> None:
        self._redis.delete(key)
        piece: list[bytes] = []
        for entry in entries:
            piece.append(entry)
            if sum(map(len, piece)) >= _PIECE_BYTES:
                self._redis.rpush(key, *piece)
                piece = []
        if piece:
            self._redis.rpush(key, *piece)
        self._redis.expire(key, _ASIDE_S)


def _key(name: Name) -> str:
    return f"segcore:{{{name.tenant}/{name.session_id}}}"


def _log(name: Name) -> str:
    return f"{_key(name)}:log"


def _keys(name: Name) -> list[str]:
    return [_key(name), _log(name)]


def _index(tenant: str) -> str:
    return f"segcore:sessions:{{{tenant}/}}"


def _ms(seconds: float | None) -> int | str:
    return "" if seconds is None else max(0, round(seconds * 1000))


@contextmanager
def _errors() -> Iterator[None]:
    """The server's errors as ours."""
    import redis

    try:
        yield
    except redis.OutOfMemoryError as error:
        raise StorageFull("the Redis server that holds the sessions is full") from error
    except (redis.RedisError, OSError) as error:
        if "OOM" in str(error):  # from within a script
            raise StorageFull("the Redis server that holds the sessions is full") from error
        raise Unavailable(f"the sessions' Redis server doesn't answer: {error}", retry_after_s="1") from error
