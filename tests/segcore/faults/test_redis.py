"""Redis killed, stopped, full, emptied or locked: each fault is counted, and costs time, never a wrong token."""

from __future__ import annotations

import signal
import time

import pytest
import torch

from segcore.config import CacheConfig
from segcore.errors import StorageFull, TierUnavailable
from segcore.fingerprint import Fingerprint
from segcore.pastkv import guard
from segcore.pastkv import redis as redis_tier
from segcore.pastkv.format import BlockFormat
from segcore.pastkv.manager import PastKVManager
from segcore.pastkv.redis import RedisTier
from tests.redis_server import RedisServer
from tests.segcore.blocks import block, key
from tests.segcore.engines import SECONDS
from tests.segcore.faults.engines import KV_BYTES, STREAM, answer, read, settled


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short times, so that tests needn't wait: a server that is stopped costs 0.3 s, and is left alone for 0.5 s."""
    monkeypatch.setattr(redis_tier, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(guard, "PAUSE_S", 0.5)


def test_redis_holds_the_past(make_engine, redis_server, undisturbed):
    engine = make_engine(shared=redis_server.url)
    read(engine)
    assert answer(engine) == undisturbed
    other = make_engine(shared=redis_server.url)
    settled(engine)
    before = redis_server.client().dbsize()
    read(other)
    assert answer(other) == undisturbed
    settled(other)
    assert redis_server.client().dbsize() == before
    assert not engine.stats().faults
    assert not other.stats().faults


@pytest.mark.slow
def test_redis_killed_before_a_read(make_engine, own_redis, undisturbed, impatient):
    """The past was in Redis alone; then host memory must do, and the tokens are run again."""
    engine = make_engine(shared=own_redis.url, host_bytes=100 * KV_BYTES)
    read(engine)
    settled(engine)
    for name in engine._past._host.keys:
        engine._past._host.delete(name)
    own_redis.kill()
    assert answer(engine) == undisturbed
    assert engine.stats().faults["shared.TierUnavailable"] > 0
    own_redis.start()
    time.sleep(0.6)
    read(engine, "later", tenant="other")
    settled(engine)
    assert own_redis.client().dbsize() > 0


def test_redis_killed_in_a_read(own_redis, monkeypatch, impatient):
    tier = RedisTier(own_redis.url, BlockFormat(Fingerprint()), None)
    tier.put(block(0))
    reader, calls = tier._reader, []

    def dying(name):
        ranges = reader(name)

        def read_ranges(wanted):
            calls.append(wanted)
            if len(calls) == 2:  # after the header, before the rows
                own_redis.kill()
            return ranges(wanted)

        return read_ranges

    monkeypatch.setattr(tier, "_reader", dying)
    with pytest.raises(TierUnavailable):
        tier.rows(key(0), torch.tensor([0]))
    own_redis.start()
    tier.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_redis_ends_in_a_write(make_engine, own_redis, undisturbed, impatient, number):
    """In the middle of a stream; later it is there again, and is used again."""
    engine = make_engine(shared=own_redis.url, host_bytes=100 * KV_BYTES)
    engine.open("s")
    engine.append("s", STREAM[:40])
    engine.flush("s").result(SECONDS)
    if number == signal.SIGKILL:
        own_redis.kill()
    else:
        own_redis.signal(number)
    engine.append("s", STREAM[40:])
    assert answer(engine) == undisturbed
    settled(engine)
    assert engine.stats().faults["shared.TierUnavailable"] > 0
    if number == signal.SIGKILL:
        own_redis.start()
    else:
        own_redis.signal(signal.SIGCONT)
    time.sleep(0.6)
    faults = dict(engine.stats().faults)
    before = own_redis.client().dbsize()
    read(engine, "other", tenant="other")
    settled(engine)
    assert engine.stats().faults == faults
    assert own_redis.client().dbsize() >= before + len(STREAM) // 16


@pytest.mark.slow
def test_a_stopped_redis_costs_one_time_out_a_pause(own_redis):
    """The real 2 s, once, and not once a block."""
    past = PastKVManager(CacheConfig(shared=own_redis.url))
    own_redis.signal(signal.SIGSTOP)
    began = time.monotonic()
    for seed in range(20):
        assert not past.holds(key(seed))
    assert redis_tier.TIMEOUT_S <= time.monotonic() - began < redis_tier.TIMEOUT_S + 1.5
    assert past.faults == {"shared.TierUnavailable": 1}
    own_redis.signal(signal.SIGCONT)
    past.close()


def test_a_full_redis(make_engine, own_redis, undisturbed):
    with own_redis.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 100_000)
    engine = make_engine(shared=own_redis.url, host_bytes=100 * KV_BYTES)
    read(engine)
    assert answer(engine) == undisturbed
    settled(engine)
    assert engine.stats().faults["shared.StorageFull"] > 0
    assert "shared.TierUnavailable" not in engine.stats().faults
    little = make_engine(shared=own_redis.url)
    little.open("s", tenant="other")
    little.append("s", STREAM)
    with pytest.raises(StorageFull):
        little.flush("s").result(SECONDS)


@pytest.mark.parametrize("lost", ["all", "some"])
def test_redis_loses_blocks(make_engine, redis_server, undisturbed, lost):
    engine = make_engine(shared=redis_server.url)
    read(engine)
    settled(engine)
    with redis_server.client() as client:
        for name in sorted(client.keys())[:: 1 if lost == "all" else 2]:
            client.delete(name)
    assert answer(engine) == undisturbed
    assert engine.stats().faults["shared.BlockMissing"] > 0


def test_something_else_in_redis(make_engine, redis_server, undisturbed):
    engine = make_engine(shared=redis_server.url)
    read(engine)
    settled(engine)
    with redis_server.client() as client:
        for i, name in enumerate(sorted(client.keys())):
            if i % 2:
                client.delete(name)
                client.lpush(name, "a list")
            else:
                client.set(name, b"\xff" * 100)
    assert answer(engine) == undisturbed
    assert engine.stats().faults["shared.BlockDamaged"] > 0


def test_redis_with_a_password(make_engine, own_redis: RedisServer, undisturbed):
    own_redis.client().config_set("requirepass", "secret")
    good = make_engine(shared=own_redis.url.replace("unix://", "unix://:secret@"), host_bytes=100 * KV_BYTES)
    read(good)
    assert answer(good) == undisturbed
    assert not good.stats().faults
    for password in ("", ":wrong@"):
        bad = make_engine(shared=own_redis.url.replace("unix://", f"unix://{password}"), host_bytes=100 * KV_BYTES)
        read(bad)
        assert answer(bad) == undisturbed
        settled(bad)
        assert bad.stats().faults["shared.TierUnavailable"] > 0
