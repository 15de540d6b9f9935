"""Encryption at rest: nothing is kept in plain, and without the right key nothing is read, sessions or past KV."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from segcore.errors import (
    AlreadyExists,
    BlockDamaged,
    BlockMismatch,
    ConfigError,
    Conflict,
    FailedPrecondition,
    NotFound,
    SessionLost,
)
from segcore.fingerprint import Fingerprint
from segcore.pastkv.base import Block
from segcore.pastkv.directory import LocalDisk
from segcore.pastkv.format import BlockFormat
from services.serving.encryption import PIECE_BYTES, Keys
from services.serving.session import Sessions
from tests.redis_server import RedisServer
from tests.services.serving.conftest import DOCUMENT, GREEDY, ask, upload

OLD, NEW, OTHER = (base64.b64encode(bytes([i]) * 32).decode() for i in range(3))


@pytest.fixture
def keys_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of keys; of tenant "" if no other is named."""

    def write(*keys: str, tenant: str = "") -> Path:
        path = tmp_path.parent / f"{tmp_path.name}-keys.yaml"  # not where the tests look for secrets
        path.write_text(f'keys:\n  "{tenant}": [{", ".join(keys)}]\n')
        return path

    return write


def stored_values(server: RedisServer) -> Iterator[bytes]:
    """All that a Redis server holds."""
    with server.client() as client:
        for key in client.scan_iter():
            kind = client.type(key)
            if kind == b"string":
                yield client.get(key)
            elif kind == b"list":
                yield from client.lrange(key, 0, -1)
            elif kind == b"hash":
                yield from client.hgetall(key).values()


def secrets_of(sessions: Sessions) -> dict[str, bytes]:
    """Bytes that must not be found anywhere: some of the text, tokens, keys and values, and of what describes them."""
    live = next(iter(sessions._lives._lives.values()))
    past = sessions._engine._past
    blocks = [past._host.find(key) for key in past._host.keys]
    tokens = sessions._engine._sessions[live.key].past.journal.tokens
    return {
        "text": DOCUMENT[100:120],
        "tokens": array("i", tokens[40:48]).tobytes(),
        "past": blocks[0].kv_SC2D[3, 1].contiguous().numpy().tobytes(),
        "record": b"secret-name",
        "header": b"__metadata__",
    }


@pytest.mark.parametrize("encrypted", [True, False])
@pytest.mark.parametrize("kind", ["files", "redis"])
async def test_nothing_is_kept_in_plain(replica, own_redis, keys_file, tmp_path, kind, encrypted):
    where = {"sessions": own_redis.url, "past_shared": own_redis.url} if kind == "redis" else {}
    one = replica(**where, encryption_keys=keys_file(NEW) if encrypted else None)
    await one.create("", "s")
    await upload(one, document_id="secret-name")
    await ask(one)
    one._engine.check_integrity()
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    kept += stored_values(own_redis)
    assert sum(len(value) > 10_000 for value in kept) > 10  # blocks of past KV are among them
    found = {what for what, secret in secrets_of(one).items() if any(secret in value for value in kept)}
    assert found == (set() if encrypted else {"text", "tokens", "past", "record", "header"})


@pytest.mark.parametrize("kind", ["files", "redis"])
async def test_any_replica_with_the_keys_goes_on(replica, own_redis, keys_file, undisturbed, kind):
    where = {"sessions": own_redis.url, "past_shared": own_redis.url} if kind == "redis" else {}
    expected = await undisturbed(GREEDY)
    one = replica(**where, encryption_keys=keys_file(OLD))
    await one.create("", "s")
    await upload(one)
    assert await ask(one) == expected[0]
    one._engine.check_integrity()
    two = replica(**where, encryption_keys=keys_file(NEW, OLD))  # the key was replaced meanwhile
    assert await ask(two) == expected[1]
    counts = two._engine.stats().counts
    assert (counts["restored.found"], counts["restored.lost"]) == (17, 0)
    two._engine.check_integrity()
    three = replica(**where, encryption_keys=keys_file(NEW))
    with pytest.raises(FailedPrecondition, match="isn't in encryption_keys"):
        await ask(three)  # some of its log is older than the new key


async def test_without_the_right_key_there_is_an_error_and_no_garbage(replica, keys_file):
    one = replica(encryption_keys=keys_file(OLD))
    await one.create("", "s")
    await upload(one)
    for keys, message in ((keys_file(OTHER), "isn't in encryption_keys"), (None, "no encryption_keys")):
        two = replica(encryption_keys=keys)
        for call in (lambda two=two: two.get("", "s"), lambda two=two: ask(two)):
            with pytest.raises(FailedPrecondition, match=message):
                await call()
    assert await ask(one)  # the others let it be
    with pytest.raises(FailedPrecondition, match="no encryption key for tenant 'acme'"):
        await one.create("acme", "s")
    with pytest.raises(FailedPrecondition, match="no encryption key for tenant 'acme'"):
        one._engine.open("stream", tenant="acme")


@pytest.mark.parametrize("kind", ["files", "redis"])
@pytest.mark.parametrize("left", ["another key", "no key of the tenant"])
async def test_a_session_whose_key_is_gone_is_listed_and_can_be_deleted(replica, own_redis, keys_file, kind, left):
    where = {"sessions": own_redis.url} if kind == "redis" else {}
    one = replica(**where, encryption_keys=keys_file(OLD))
    generation = (await one.create("", "old")).generation
    await upload(one, "old")
    two = replica(**where, encryption_keys=keys_file(NEW, tenant="" if left == "another key" else "other"))
    readable = ["new"] if left == "another key" else []
    for name in readable:
        await two.create("", name)
    infos = {info.session_id: info for info in (await two.list_sessions("")).sessions}
    assert set(infos) == {"old", *readable}
    assert "isn't in encryption_keys" in infos["old"].unreadable
    assert all(infos[name].unreadable == "" and infos[name].model for name in readable)
    with pytest.raises(FailedPrecondition, match="isn't in encryption_keys"):
        await two.get("", "old")
    with pytest.raises(Conflict):
        await two.delete("", "old", expected_generation=generation)
    await two.delete("", "old", request_id="d")
    if readable:
        await two.delete("", "old", request_id="d")  # made again
    with pytest.raises(NotFound):
        await two.get("", "old")
    assert [info.session_id for info in (await two.list_sessions("")).sessions] == readable


async def test_calls_of_no_session_are_remembered_encrypted(replica, keys_file):
    one = replica(encryption_keys=keys_file(OLD, tenant="acme"))
    for _ in "12":
        await one.once("acme", "r", "digest")
    with pytest.raises(AlreadyExists):
        await one.once("acme", "r", "another")
    assert (await one.list_sessions("acme")).sessions == []


async def test_sessions_in_plain_are_refused(replica, keys_file):
    one = replica()
    await one.create("", "s")
    with pytest.raises(FailedPrecondition, match="isn't encrypted"):
        await replica(encryption_keys=keys_file(OLD)).get("", "s")


def test_a_value_is_bound_to_its_name_and_place(keys_file):
    keys = Keys.read(keys_file(OLD))
    value = bytes(range(256)) * (PIECE_BYTES // 100)  # two pieces and a half
    stored = keys.seal("", "one", value)
    assert keys.unseal("one", stored) == value
    assert keys.unseal("one", keys.seal("", "one", b"")) == b""
    assert keys.seal("", "one", value) != stored
    head, piece = len(stored) - len(value) - 3 * 16, PIECE_BYTES + 16
    swapped = stored[:head] + stored[head + piece : head + 2 * piece] + stored[head : head + piece]
    for damaged in (swapped, stored[:-1], stored[:50], stored[:20], stored[:-40] + b"x" + stored[-39:]):
        with pytest.raises(SessionLost):
            keys.unseal("one", damaged)
    with pytest.raises(SessionLost):
        keys.unseal("two", stored)


def large_block(name: str) -> Block:
    """Its bulk takes several pieces."""
    kv = torch.randn((100, 4, 2, 64), generator=torch.Generator().manual_seed(1))
    return Block(name, kv, {"keys": torch.ones(2, 3)}, {"logits": torch.zeros(5)})


def test_parts_of_blocks_are_read(keys_file, tmp_path):
    disk = LocalDisk(tmp_path / "disk", BlockFormat(Fingerprint(), Keys.read(keys_file(OLD))), None)
    block = large_block("a" * 40)
    disk.put(block)
    for rows in ([0], [99, 0], [31, 32, 33], list(range(100))):
        assert torch.equal(disk.rows(block.key, torch.tensor(rows)), block.kv_SC2D[rows])
    head = disk.head(block.key)
    assert torch.equal(head.index["keys"], torch.ones(2, 3))
    path = disk._path(block.key)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    disk.head(block.key)
    with pytest.raises(BlockDamaged):
        disk.rows(block.key, torch.tensor([99]))
    disk._format = BlockFormat(Fingerprint(), Keys.read(keys_file(OTHER)))
    with pytest.raises(BlockMismatch, match="isn't in encryption_keys"):
        disk.head(block.key)
    disk._format = BlockFormat(Fingerprint())
    with pytest.raises(BlockDamaged):
        disk.head(block.key)
    disk.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys: {}", "at least 1"),
        ("keys: {'': []}", "at least 1"),
        ("keys: {'': [SECRETsecret]}", "32 random bytes"),
        (f"keys: {{a: [{OLD}], b: [{OLD}]}}", "twice"),
        (f"keys: {{'a b': [{OLD}]}}", "pattern"),
        (f"others: {OLD}", "keys"),
    ],
)
def test_a_file_of_keys_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as refused:
        Keys.read(path)
    assert "SECRET" not in refused.value.message
    assert OLD not in refused.value.message
    with pytest.raises(ConfigError):
        Keys.read(tmp_path / "absent.yaml")
