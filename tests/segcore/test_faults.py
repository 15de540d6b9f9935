"""Faults of past KV on a real engine: each is detected and counted, and costs time, never a wrong token."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segcore.config import CacheConfig, EngineConfig
from segcore.engine.engine import Engine
from segcore.errors import BlockDamaged, BlockMismatch, SessionFailed, StorageFull, TierUnavailable
from segcore.fingerprint import Fingerprint
from segcore.model import CausalLM
from segcore.pastkv import guard
from segcore.pastkv import redis as redis_tier
from segcore.pastkv.directory import DirectoryTier, LocalDisk, SharedDirectory
from segcore.pastkv.format import BlockFormat
from segcore.pastkv.manager import PastKVManager
from segcore.pastkv.redis import RedisTier
from tests.conftest import VOCABULARY, tiny_model, tiny_segment
from tests.segcore import engines
from tests.segcore.blocks import TOKENS, block, bulk, key, same, same_tensors
from tests.segcore.conftest import RedisServer
from tests.segcore.engines import SECONDS, engine_of

STREAM = torch.randint(0, VOCABULARY, (105,), generator=torch.Generator().manual_seed(5)).tolist()
KV_BYTES = 16 * 4 * 2 * 8 * 8  # tokens x cells x (keys, values) x dimensions x fp64
# Host memory for two blocks or so: most of the stream's past must be elsewhere.
LITTLE = 6 * KV_BYTES
EVERY_TOKEN = 24


@pytest.fixture
def make_engine(tiny_lm, running) -> Callable[..., Engine]:
    """Makes engines; options that aren't the engine's are the cache's."""

    def make(lm: CausalLM = tiny_lm, /, *, host_bytes: int = LITTLE, **changes: object) -> Engine:
        engine = {f.name for f in dataclasses.fields(EngineConfig)}
        cache = {name: changes.pop(name) for name in list(changes) if name not in engine}
        return running(engine_of(lm, **changes, cache=CacheConfig(host_bytes=host_bytes, **cache)))

    return make


def read(engine: Engine, session: str = "s", **options: str) -> None:
    """A session that has read the stream."""
    engine.open(session, **options)
    engine.append(session, STREAM)
    engine.flush(session).result(SECONDS)


def answer(engine: Engine, session: str = "s", count: int = EVERY_TOKEN, **params: object) -> list[int]:
    """Greedy tokens over more than a segment, so that several choices are made."""
    engine.mark(session)
    return engines.answer(engine, session, count, **params)


@pytest.fixture(scope="module")
def undisturbed(tiny_lm: CausalLM) -> list[int]:
    engine = engine_of(tiny_lm)
    read(engine)
    tokens = answer(engine)
    engine.shutdown()
    return tokens


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def settled(engine: Engine) -> None:
    """Wait until everything is written."""
    engine.check_integrity()


# Bytes


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), bit=st.integers(0, 7), where=st.sampled_from(["header", "head", "bulk", "anywhere"]))
def test_no_flipped_bit_is_silent(data, bit, where):
    """Wherever it is: what is read is right, or the error is typed."""
    blocks, one = BlockFormat(Fingerprint(model="m")), block(3)
    encoded = bytearray(b"".join(blocks.encode(one)))
    header = int.from_bytes(encoded[:8], "little") + 8
    ranges = {"header": (0, header), "bulk": (len(encoded) - one.kv_SC2D.nbytes, len(encoded))}
    ranges |= {"head": (header, ranges["bulk"][0]), "anywhere": (0, len(encoded))}
    at = data.draw(st.integers(ranges[where][0], ranges[where][1] - 1))
    encoded[at] ^= 1 << bit
    damaged = 0

    def read(wanted):
        return [bytes(encoded[start:stop]) for start, stop in wanted]

    try:
        assert same(blocks.rows(one.key, read, torch.arange(TOKENS)), one.kv_SC2D)
    except (BlockDamaged, BlockMismatch):
        damaged += 1
    try:
        head = blocks.head(one.key, read)
        assert same_tensors(head.index, one.index)
        assert same_tensors(head.boundary, one.boundary)
    except (BlockDamaged, BlockMismatch):
        damaged += 1
    assert damaged == (2 if at < header else 1)


@given(kept=st.floats(0, 0.999), added=st.binary(max_size=3))
@settings(max_examples=60, deadline=None)
def test_no_truncation_is_silent(kept, added):
    blocks, one = BlockFormat(Fingerprint()), block(4)
    encoded = b"".join(blocks.encode(one))
    short = encoded[: int(len(encoded) * kept)]

    def read(wanted):
        return [short[start:stop] for start, stop in wanted]

    with pytest.raises(BlockDamaged):
        blocks.rows(one.key, read, torch.tensor([TOKENS - 1]))
    if len(short) < len(encoded) - one.kv_SC2D.nbytes:
        with pytest.raises(BlockDamaged):
            blocks.head(one.key, read)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "removed"])
@pytest.mark.parametrize("kind", ["directory", "shared"])
def test_damaged_files(make_engine, tmp_path, undisturbed, kind, damage):
    engine = make_engine(**{kind: tmp_path if kind == "directory" else str(tmp_path)})
    read(engine)
    settled(engine)
    assert len(files(tmp_path)) >= len(STREAM) // 16
    for path in files(tmp_path):
        data = bytearray(path.read_bytes())
        if damage == "flipped":
            for page in range(4):
                data[-1 - page * KV_BYTES // 4] ^= 0x10
        path.write_bytes(data)
        if damage == "truncated":
            os.truncate(path, len(data) // 2)
        elif damage == "emptied":
            os.truncate(path, 0)
        elif damage == "removed":
            path.unlink()
    assert answer(engine) == undisturbed
    tier = "disk" if kind == "directory" else "shared"
    fault = "BlockMissing" if damage == "removed" else "BlockDamaged"
    assert engine.stats().faults[f"{tier}.{fault}"] > 0


def test_damaged_in_one_tier_is_read_from_the_next(make_engine, tmp_path, undisturbed):
    engine = make_engine(directory=tmp_path / "d", shared=str(tmp_path / "s"))
    read(engine)
    settled(engine)
    for path in files(tmp_path / "d"):
        os.truncate(path, 100)
    assert answer(engine) == undisturbed
    assert set(engine.stats().faults) == {"disk.BlockDamaged"}
    # Nothing was run again: the next tier had it.


# Blocks of others

OTHERS = {"layout": 999}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Fingerprint)])
def test_a_block_of_another_fingerprint_is_refused(tmp_path, field):
    """Each field in turn; a file of the other in this one's place."""
    mine = Fingerprint(**{f.name: f"my {f.name}" for f in dataclasses.fields(Fingerprint) if f.name != "layout"})
    other = dataclasses.replace(mine, **{field: OTHERS.get(field, "other")})
    assert mine.digest != other.digest
    managers = [PastKVManager(CacheConfig(), fingerprint) for fingerprint in (mine, other)]
    assert len({past.open_stream(None).root for past in managers}) == 2
    tiers = [LocalDisk(tmp_path, BlockFormat(fingerprint), None) for fingerprint in (mine, other)]
    tiers[1].put(block(0))
    shutil.copytree(tiers[1].folder, tiers[0].folder, dirs_exist_ok=True)
    for read_block in (lambda: tiers[0].rows(key(0), torch.tensor([0])), lambda: tiers[0].head(key(0))):
        with pytest.raises(BlockMismatch) as raised:
            read_block()
        assert raised.value.details["fields"] == field
    assert same(tiers[1].rows(key(0), torch.tensor([0])), bulk(0)[[0]])
    for tier in tiers:
        tier.close()


def other_weights() -> CausalLM:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-6
    return CausalLM(model)


DIFFERENT: dict[str, tuple[Callable[[], CausalLM] | None, dict[str, object]]] = {
    "weights": (other_weights, {}),
    "dtype": (lambda: CausalLM(tiny_model(dtype=torch.float32)), {}),
    "model": (None, {"model": "other"}),
    "tokenizer": (None, {"tokenizer": "other"}),
    "adapter": (None, {"adapter": "other"}),
    "segment": (None, {"segment": tiny_segment(query_window_tokens=5)}),
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Fingerprint) if f.name != "layout"])
def test_engines_that_differ_share_nothing(make_engine, tmp_path, field):
    """Even if the other's files are put where its own would be."""
    model, changes = DIFFERENT[field]
    first = make_engine(shared=str(tmp_path))
    read(first)
    settled(first)
    theirs = {path.name: path for path in files(tmp_path)}
    second = make_engine(*([model()] if model else []), shared=str(tmp_path), **changes)
    assert first.fingerprint.digest != second.fingerprint.digest
    read(second)
    settled(second)
    ours = [path for path in files(tmp_path) if path not in theirs.values()]
    assert len(ours) == len(theirs)
    assert not {path.name for path in ours} & theirs.keys()
    expected = answer(second)
    second.close("s")
    settled(second)
    for mine, other in zip(ours, theirs.values(), strict=True):
        shutil.copy(other, mine)
    third = make_engine(*([model()] if model else []), shared=str(tmp_path), **changes)
    read(third)
    assert answer(third) == expected
    assert third.stats().faults["shared.BlockMismatch"] > 0


def test_tenants_share_nothing(make_engine, tmp_path, undisturbed):
    engine = make_engine(directory=tmp_path, host_bytes=2 * LITTLE)
    read(engine, "a", tenant="a")
    settled(engine)
    count = len(files(tmp_path))
    read(engine, "same", tenant="a")
    settled(engine)
    assert len(files(tmp_path)) == count
    read(engine, "b", tenant="b")
    settled(engine)
    assert len(files(tmp_path)) == 2 * count
    assert answer(engine, "b") == undisturbed


def test_a_block_in_anothers_place_is_refused(make_engine, tmp_path, undisturbed):
    engine = make_engine(directory=tmp_path)
    read(engine)
    settled(engine)
    stored = files(tmp_path)
    contents = [path.read_bytes() for path in stored]
    for path, data in zip(stored, contents[1:] + contents[:1], strict=True):
        path.write_bytes(data)
    assert answer(engine) == undisturbed
    assert engine.stats().faults["disk.BlockMismatch"] > 0


# Disks


def test_a_full_budget_is_refused_or_held_in_memory(make_engine, tmp_path, undisturbed):
    engine = make_engine(directory=tmp_path, disk_bytes=0)
    engine.open("s")
    engine.append("s", STREAM)
    with pytest.raises(StorageFull, match="raise host_bytes"):
        engine.flush("s").result(SECONDS)
    with pytest.raises(SessionFailed):
        engine.append("s", [1])
    assert engine.stats().faults["disk.StorageFull"] > 0
    roomy = make_engine(directory=tmp_path, disk_bytes=0, host_bytes=100 * KV_BYTES)
    read(roomy)
    assert answer(roomy) == undisturbed
    assert roomy.stats().faults["disk.StorageFull"] > 0


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A tmpfs; skips where this process may not mount."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(make_engine, tmp_path, undisturbed):
    """A real ENOSPC: the disk takes two blocks. Another tier, or host memory, takes the rest."""
    with mounted(tmp_path / "tiny", "-t", "tmpfs", "-o", "size=64k", "tmpfs") as tiny:
        engine = make_engine(directory=tiny, host_bytes=100 * KV_BYTES)
        read(engine)
        assert answer(engine) == undisturbed
        settled(engine)
        assert engine.stats().faults["disk.StorageFull"] > 0
        assert not list(tiny.rglob("*.partial"))
        assert 0 < len(files(tiny)) < len(STREAM) // 16
        little = make_engine(directory=tiny)
        little.open("s")
        little.append("s", STREAM)
        with pytest.raises(StorageFull):
            little.flush("s").result(SECONDS)
        little.shutdown()
        engine.shutdown()


def test_a_full_disk_gives_up_blocks_that_nobody_uses(make_engine, tmp_path, undisturbed):
    with mounted(tmp_path / "tiny", "-t", "tmpfs", "-o", "size=256k", "tmpfs") as tiny:
        engine = make_engine(directory=tiny)
        for turn in range(6):
            engine.open(f"{turn}")
            engine.append(f"{turn}", [turn, *STREAM])
            engine.flush(f"{turn}").result(SECONDS)
            engine.close(f"{turn}")
        read(engine)
        assert answer(engine) == undisturbed
        engine.shutdown()


def test_a_file_size_limit(tmp_path):
    """What a write's end would exceed fails in the middle of it, with some bytes written."""
    disk = LocalDisk(tmp_path, BlockFormat(Fingerprint()), None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(StorageFull):
            disk.put(block(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.rglob("*.partial"))
    assert not disk.holds(key(0))
    disk.put(block(0))
    assert same(disk.rows(key(0), torch.tensor([1])), bulk(0)[[1]])
    disk.close()


def test_a_directory_that_turns_read_only(make_engine, tmp_path, undisturbed):
    """Root may write anywhere but on a file system that is mounted read-only."""
    with mounted(tmp_path / "mnt", "-t", "tmpfs", "tmpfs") as folder:
        engine = make_engine(directory=folder, host_bytes=100 * KV_BYTES)
        engine.open("s")
        engine.append("s", STREAM[:40])
        engine.flush("s").result(SECONDS)
        settled(engine)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        engine.append("s", STREAM[40:])
        engine.flush("s").result(SECONDS)
        assert answer(engine) == undisturbed
        assert engine.stats().faults["disk.TierUnavailable"] > 0
        with pytest.raises(TierUnavailable, match="can't be kept in"):
            make_engine(directory=folder)
        with pytest.raises(TierUnavailable, match="can't be kept in"):
            make_engine(shared=str(folder))
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        engine.shutdown()


def test_a_path_that_cannot_be_made_is_refused(make_engine, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        for option in ({"directory": path}, {"shared": str(path)}):
            with pytest.raises(TierUnavailable, match="can't be kept in"):
                make_engine(**option)


@pytest.mark.parametrize("kind", ["directory", "shared"])
def test_a_removed_tier_comes_back(make_engine, tmp_path, undisturbed, kind):
    folder = tmp_path / "past"
    engine = make_engine(**{kind: folder if kind == "directory" else str(folder)})
    read(engine)
    settled(engine)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert answer(engine) == undisturbed
    settled(engine)
    assert engine.stats().faults[f"{'disk' if kind == 'directory' else 'shared'}.BlockMissing"] > 0
    assert files(folder)


def test_a_shared_directory_swept_by_others(make_engine, tmp_path, undisturbed):
    """Blocks of a live session vanish again and again while it answers: another tier's budget has no room for them."""
    engine = make_engine(shared=str(tmp_path))
    sweeper = SharedDirectory(tmp_path, "other", BlockFormat(Fingerprint()), 5000)
    read(engine)
    settled(engine)

    def sweep(count: int) -> None:
        if count in (1, 9, 17):
            sweeper._scan()
            sweeper.put(block(count))

    assert answer(engine, at_token=sweep) == undisturbed
    assert engine.stats().faults["shared.BlockMissing"] > 0


# Redis


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


# Streams


def test_no_tier_left_at_all(make_engine, tmp_path, undisturbed):
    """Everything but the tokens is lost, host memory too, before the answer and within it."""
    engine = make_engine(directory=tmp_path, host_bytes=100 * KV_BYTES)
    read(engine)
    settled(engine)

    def lose() -> None:
        for name in engine._past._host.keys:
            engine._past._host.delete(name)
        for path in files(tmp_path):
            path.unlink()

    lose()

    assert answer(engine, at_token=lambda count: lose() if count in (3, 9) else None) == undisturbed


def test_a_fault_in_one_session_leaves_others_alone(make_engine, tmp_path, undisturbed, monkeypatch):
    engine = make_engine(directory=tmp_path, host_bytes=2 * LITTLE)
    read(engine, "a", tenant="a")
    settled(engine)
    for path in files(tmp_path):
        os.truncate(path, 10)
    read(engine, "b", tenant="b")
    assert answer(engine, "b") == undisturbed
    assert answer(engine, "a") == undisturbed


def test_every_read_fails_once(make_engine, tmp_path, undisturbed, monkeypatch):
    """A disk with an unreadable sector: that block is lost, the disk isn't left alone for it."""
    failed: set[str] = set()
    rows = DirectoryTier.rows

    def flaky(tier, name, rows_n):
        if name not in failed:
            failed.add(name)
            with tier._open(name):
                raise OSError(5, "Input/output error")
        return rows(tier, name, rows_n)

    monkeypatch.setattr(DirectoryTier, "rows", flaky)
    engine = make_engine(directory=tmp_path)
    read(engine)
    assert answer(engine) == undisturbed
    assert engine.stats().faults["disk.BlockDamaged"] == len(failed) > 0
    assert "disk.TierUnavailable" not in engine.stats().faults
