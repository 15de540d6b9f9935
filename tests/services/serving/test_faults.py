"""The directory killed, cut off, full or forgetful: calls fail and say so; nothing that was acknowledged is lost."""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from segcore.errors import Busy, NotFound, StorageFull, Unavailable
from services.serving.directory import redis as redis_directory
from tests.redis_server import RedisServer
from tests.services.serving.conftest import DOCUMENT, GREEDY, QUESTION, SAMPLED, ask, rest_of, upload


@pytest.fixture
def kept_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that writes all down at once, and forgets nothing when it is killed."""
    assert shutil.which("redis-server") is not None, "redis-server isn't installed: make redis"
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder, "--appendonly", "yes", "--appendfsync", "always")
    server.start()
    yield server
    server.signal(signal.SIGCONT)
    server.kill()


async def answered(sessions, params, disturb, restore) -> str:
    """An answer in the middle of which the directory goes, and comes back; asked for again after every failure."""
    text, after, finished, calls = "", 0, False, 0
    while not finished:
        parts = sessions.generate("", "s", QUESTION, params, request_id="r", after=after)
        calls += 1
        try:
            async for part in parts:
                text, after, finished = text + part.text, part.token_index, part.finish_reason is not None
                if calls == 1:
                    disturb()
                    calls += 1
        except (Unavailable, StorageFull):
            restore()
        assert calls < 100
        await asyncio.sleep(0.02)
    assert calls > 2
    return text


@pytest.mark.parametrize("fault", ["killed", "stopped", "full"])
async def test_redis_goes_and_comes_back(replica, kept_redis, undisturbed, fault, monkeypatch, tell):
    monkeypatch.setattr(redis_directory, "TIMEOUT_S", 0.3)
    sessions = replica(sessions=kept_redis.url)

    def disturb() -> None:
        if fault == "killed":
            kept_redis.kill()
        elif fault == "stopped":
            kept_redis.signal(signal.SIGSTOP)
        else:
            with kept_redis.client() as client:
                client.config_set("maxmemory", 1)

    def restore() -> None:
        if fault == "killed":
            kept_redis.start()
        elif fault == "stopped":
            kept_redis.signal(signal.SIGCONT)
        else:
            with kept_redis.client() as client:
                client.config_set("maxmemory", 0)

    await sessions.create("", "s")
    await sessions.open_document("", "s", "d", None)
    await sessions.append("", "s", "d", 0, DOCUMENT[:700])
    disturb()
    with pytest.raises(StorageFull if fault == "full" else Unavailable):
        await sessions.append("", "s", "d", 700, DOCUMENT[700:])
    restore()
    await asyncio.sleep(0.1)
    # A write that got no answer may have been carried out.
    assert (await sessions.get_document("", "s", "d")).committed_offset in (700, len(DOCUMENT))
    await upload(sessions)
    restored: list[int] = []
    text = await answered(sessions, SAMPLED, disturb, lambda: restored or (restore(), restored.append(1)))
    assert [text, await ask(sessions, params=SAMPLED)] == await undisturbed(SAMPLED)
    tell(f"Redis {fault} in an upload and in an answer: 0 sessions, bytes or tokens lost")


async def test_connections_that_are_cut_cost_nothing(replica, kept_redis, undisturbed, tell):
    """Every few moments the server drops all its clients; each call connects anew."""
    sessions = replica(sessions=kept_redis.url)
    cuts = 0

    def cut() -> None:
        nonlocal cuts
        with kept_redis.client() as client:
            cuts += client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    await sessions.create("", "s")
    await sessions.open_document("", "s", "d", None)
    for offset in range(0, len(DOCUMENT), 97):
        cut()
        await sessions.append("", "s", "d", offset, DOCUMENT[offset : offset + 97])
    await upload(sessions)
    text, after, whole, calls = "", 0, False, 0
    while not whole:
        calls += 1
        assert calls < 100
        with suppress(Unavailable):  # a write went out, and its answer was cut off
            async for part in sessions.generate("", "s", QUESTION, SAMPLED, request_id="r", after=after):
                text, after, whole = text + part.text, part.token_index, part.finish_reason is not None
                cut()
    assert [text, await ask(sessions, params=SAMPLED)] == await undisturbed(SAMPLED)
    assert cuts > 10
    tell(f"Redis cut off its clients {cuts} times: 0 sessions, bytes or tokens lost")


async def test_a_slow_redis_costs_time_alone(replica, kept_redis, undisturbed, monkeypatch, tell):
    sessions = replica(sessions=kept_redis.url)
    run = sessions._directory._run

    def slowly(*args: object) -> object:
        time.sleep(0.05)
        return run(*args)

    monkeypatch.setattr(sessions._directory, "_run", slowly)
    await sessions.create("", "s")
    await upload(sessions)
    assert [await ask(sessions), await ask(sessions)] == await undisturbed(GREEDY)
    tell("Redis 50 ms slower at every call: 0 sessions, bytes or tokens lost")


async def test_a_redis_that_forgot(replica, own_redis):
    """Without its append-only file a session is gone, and nobody pretends otherwise."""
    sessions = replica(sessions=own_redis.url)
    await sessions.create("", "s")
    await upload(sessions)
    with own_redis.client() as client:
        client.flushall()
    for call in (lambda: sessions.get("", "s"), lambda: ask(sessions), lambda: sessions.append("", "s", "d", 0, b"")):
        with pytest.raises(NotFound):
            await call()


async def test_a_full_disk(replica, undisturbed, tell):
    sessions = replica()
    await sessions.create("", "s")
    await sessions.open_document("", "s", "d", None)
    await sessions.append("", "s", "d", 0, DOCUMENT[:700])
    database = sessions._directory._db
    pages = database.execute("PRAGMA page_count").fetchone()[0]
    database.execute(f"PRAGMA max_page_count = {pages}")

    async def fill() -> None:
        for i in range(100):
            await sessions.create("", f"more-{i}")
            await upload(sessions, f"more-{i}", document=DOCUMENT)

    with pytest.raises(StorageFull, match="full"):
        await fill()
    database.execute("PRAGMA max_page_count = 1000000")
    assert (await sessions.get_document("", "s", "d")).committed_offset == 700
    await upload(sessions)
    assert [await ask(sessions), await ask(sessions)] == await undisturbed(GREEDY)
    tell("a full disk in an upload: 0 sessions, bytes or tokens lost")


async def test_the_clocks_of_replicas_do_not_matter(replica, redis_server, monkeypatch):
    """One that is hours ahead can't take a lease that lasts."""
    one, two = replica(sessions=redis_server.url), replica(sessions=redis_server.url)
    await one.create("", "s")
    await upload(one)
    parts = one.generate("", "s", QUESTION, GREEDY.__class__(max_tokens=400), request_id="r")
    await anext(parts)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 7200)
    with pytest.raises(Unavailable, match="another replica"):
        await two.open_document("", "s", "e", None)
    monkeypatch.setattr(time, "time", now)
    _, _, error = await rest_of(parts)
    assert error is None or isinstance(error, Unavailable | Busy)


@pytest.mark.parametrize("hours", [2, -2])
async def test_the_machine_s_clock_jumps(replica, undisturbed, hours, tell):
    """All leases are over, or last for hours: nobody writes twice, and the session goes on where its owner is alive."""
    one, two = replica(), replica()
    await one.create("", "s")
    await upload(one)
    parts = one.generate("", "s", QUESTION, SAMPLED, request_id="r")
    first = await anext(parts)
    for sessions in (one, two):
        sessions._directory._clock = lambda: time.time() + 3600 * hours
    if hours > 0:  # the lease is over, though its owner writes: it is told so, and the other one goes on
        text, _, error = await rest_of(
            two.generate("", "s", QUESTION, SAMPLED, request_id="r", after=first.token_index)
        )
        assert error is None
        _, _, error = await rest_of(parts)
        assert isinstance(error, Unavailable)
    else:
        with pytest.raises(Unavailable, match="another replica"):
            await two.open_document("", "s", "e", None)
        text, _, error = await rest_of(parts)
        assert error is None
    assert first.text + text == (await undisturbed(SAMPLED))[0]
    tell(f"the clock {hours:+} hours in an answer, and two replicas claim the session: 0 tokens lost")
