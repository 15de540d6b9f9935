"""What every directory of sessions promises."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis.crc import key_slot

from segcore.errors import AlreadyExists, Conflict, LeaseLost, NotFound, SegcoreError, Unavailable
from services.serving.directory import open_directory
from services.serving.directory.base import Directory, Name, request_name
from services.serving.directory.redis import RedisDirectory

LONG_S = 1000.0
S = Name("tenant", "s")


@pytest.fixture(params=["sqlite", "redis"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        str(tmp_path / "sessions.sqlite") if request.param == "sqlite" else request.getfixturevalue("redis_server").url
    )


@pytest.fixture
def connect(where: str) -> Iterator[Callable[[], Directory]]:
    """One more replica's connection."""
    made: list[Directory] = []

    def make() -> Directory:
        made.append(open_directory(where))
        return made[-1]

    yield make
    for directory in made:
        directory.close()


@pytest.fixture
def directory(connect: Callable[[], Directory]) -> Directory:
    return connect()


def test_what_is_written_is_read_by_another(connect):
    ours, theirs = connect(), connect()
    assert ours.create(S, b"record", [b"0", b"1"]) == 1
    lease, stored = ours.claim(S, "a", LONG_S)
    assert (stored.record, stored.generation, stored.entries) == (b"record", 1, 2)
    assert ours.commit(lease, 1, [b"2", bytes(range(256))], record=b"newer") == 2
    assert ours.commit(lease, 2, [b"4"]) == 3
    found = theirs.read(S)
    assert found is not None
    assert (found.record, found.generation, found.entries, found.deleted) == (b"newer", 3, 5, False)
    assert list(theirs.log(S)) == [b"0", b"1", b"2", bytes(range(256)), b"4"]
    assert list(theirs.log(S, 1, 3)) == [b"1", b"2"]
    assert ours.commit(lease, 3, [b"new"], keep=1) == 4
    assert list(theirs.log(S)) == [b"0", b"new"]
    assert ours.commit(lease, 4, keep=0) == 5
    assert list(theirs.log(S)) == []


def test_a_long_log(directory):
    entries = [str(i).encode() * 50 for i in range(1000)]
    directory.create(S, b"", iter(entries))
    assert list(directory.log(S)) == entries
    assert list(directory.log(S, 990, 2000)) == entries[990:]


def test_a_name_is_taken_once(connect):
    with ThreadPoolExecutor(8) as pool:

        def create(i: int) -> bool:
            try:
                connect().create(S, str(i).encode(), [str(i).encode()] * 3)
            except AlreadyExists:
                return False
            return True

        made = list(pool.map(create, range(8)))
    assert made.count(True) == 1
    stored = connect().read(S)
    assert stored is not None
    assert stored.record == str(made.index(True)).encode()
    assert list(connect().log(S)) == [stored.record] * 3


def test_a_failed_copy_leaves_nothing(directory):
    def broken() -> Iterator[bytes]:
        yield b"0"
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        directory.create(S, b"", broken())
    assert directory.read(S) is None
    directory.create(S, b"", [b"whole"])
    assert list(directory.log(S)) == [b"whole"]


def test_one_replica_at_a_time(connect):
    a, b = connect(), connect()
    a.create(S, b"")
    lease, _ = a.claim(S, "a", LONG_S)
    assert not a.renew(lease, LONG_S)
    with pytest.raises(Unavailable) as refused:
        b.claim(S, "b", LONG_S)
    assert 0 < float(refused.value.details["retry_after_s"]) <= LONG_S
    assert a.renew(lease, LONG_S)  # and learns that it is waited for
    a.release(lease)
    other, _ = b.claim(S, "b", LONG_S)
    assert other.token > lease.token
    assert not b.renew(other, LONG_S)
    for write in (lambda: a.commit(lease, 1, [b"late"]), lambda: a.renew(lease, LONG_S)):
        with pytest.raises(LeaseLost):
            write()
    a.release(lease)  # no effect
    assert not b.renew(other, LONG_S)
    assert list(b.log(S)) == []


def test_the_owner_claims_again_and_keeps_its_token(directory):
    directory.create(S, b"")
    first, _ = directory.claim(S, "a", LONG_S)
    directory.release(first)
    assert directory.claim(S, "a", LONG_S)[0] == first
    assert directory.claim(S, "a", LONG_S)[0] == first
    assert directory.commit(first, 1) == 2  # a write needs the token, and no time


def test_a_lease_ends_by_itself(connect):
    a, b = connect(), connect()
    a.create(S, b"")
    lease, _ = a.claim(S, "a", 0.05)
    time.sleep(0.1)
    other, _ = b.claim(S, "b", LONG_S)
    with pytest.raises(LeaseLost):
        a.commit(lease, 1)
    b.commit(other, 1)


def test_a_writer_whose_view_is_old_writes_nothing(directory):
    directory.create(S, b"")
    lease, _ = directory.claim(S, "a", LONG_S)
    directory.commit(lease, 1, [b"0"])
    with pytest.raises(LeaseLost):
        directory.commit(lease, 1, [b"0"])
    assert list(directory.log(S)) == [b"0"]


def test_deleted_sessions(directory):
    directory.create(S, b"", [b"0"])
    lease, _ = directory.claim(S, "a", LONG_S)
    with pytest.raises(Conflict):
        directory.delete(S, b"gone", LONG_S, generation=7)
    directory.delete(S, b"gone", LONG_S, generation=1)
    stored = directory.read(S)
    assert stored is not None
    assert (stored.record, stored.deleted, stored.entries) == (b"gone", True, 0)
    assert directory.names("tenant", "", 10) == []
    for call in (
        lambda: directory.claim(S, "a", LONG_S),
        lambda: directory.delete(S, b"", LONG_S),
    ):
        with pytest.raises(NotFound):
            call()
    with pytest.raises(LeaseLost):
        directory.commit(lease, 1)
    directory.create(S, b"again")
    with pytest.raises(LeaseLost):  # the name's earlier session's
        directory.commit(lease, 1)
    again, stored = directory.claim(S, "a", LONG_S)
    assert (stored.record, stored.generation) == (b"again", 1)
    assert again.token > lease.token


def test_time_to_live(directory):
    directory.create(S, b"", [b"0"], ttl_s=0.2)
    lease, _ = directory.claim(S, "a", LONG_S)
    directory.commit(lease, 1, [b"1"], ttl_s=LONG_S)
    time.sleep(0.25)
    assert list(directory.log(S)) == [b"0", b"1"]
    directory.commit(lease, 2, ttl_s=0.05)
    time.sleep(0.1)
    assert directory.read(S) is None
    assert directory.names("tenant", "", 10) == []
    with pytest.raises(SegcoreError):
        directory.commit(lease, 3)
    with pytest.raises(NotFound):
        directory.claim(S, "a", LONG_S)
    directory.create(S, b"new")
    assert list(directory.log(S)) == []


def test_requests_of_no_session_are_never_listed(directory):
    name = request_name("tenant", "r")
    directory.create(name, b"record", ttl_s=LONG_S)
    assert directory.read(name).record == b"record"
    assert directory.names("tenant", "", 10) == []
    with pytest.raises(AlreadyExists):
        directory.create(name, b"other")
    if isinstance(directory, RedisDirectory):  # no listing ever removes a name of theirs from an index
        assert len(directory._redis.keys("segcore:*requests*")) == 1


def test_a_sessions_keys_lie_in_one_slot_of_a_cluster(redis_server):
    """Else its scripts would be refused there. What names are listed by is elsewhere, and in no script."""
    directory = RedisDirectory(redis_server.url)
    directory.create(S, b"record", [b"entry"])
    kept = directory._redis.keys("segcore:*")
    slots = {key: key_slot(key) for key in kept if not key.startswith(b"segcore:sessions:")}
    assert len(slots) == 2
    assert len(set(slots.values())) == 1
    directory.close()


def test_names_by_tenant_and_page(directory):
    for session_id in ("b", "a", "C", "d", "-"):
        directory.create(Name("one", session_id), b"")
    directory.create(Name("", "other"), b"")
    directory.create(Name("two", "a"), b"")
    directory.delete(Name("one", "d"), b"", LONG_S)
    assert directory.names("one", "", 3) == ["-", "C", "a"]
    assert directory.names("one", "a", 3) == ["b"]
    assert directory.names("", "", 3) == ["other"]
    assert directory.names("nobody", "", 3) == []


def test_replicas_that_add_in_turn_lose_nothing(connect):
    """Four replicas write one session, each claiming it again when it has lost it."""
    connect().create(S, b"")

    def work(owner: str) -> int:
        directory, done = connect(), 0
        while done < 25:
            try:
                lease, stored = directory.claim(S, owner, 0.0)
                directory.commit(lease, stored.generation, [f"{owner}{done}".encode()])
                done += 1
            except Unavailable:
                continue
        return done

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, "abcd")) == 100
    log = [entry.decode() for entry in connect().log(S)]
    for owner in "abcd":
        assert [entry for entry in log if entry[0] == owner] == [f"{owner}{i}" for i in range(25)]
    stored = connect().read(S)
    assert stored is not None
    assert stored.generation == 101
