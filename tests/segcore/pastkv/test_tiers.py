"""Every tier gives back what it got, bit for bit, or a typed error; a block is there whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from segcore.errors import BlockMissing, ConfigError, PastKVError, StorageFull, TierUnavailable
from segcore.fingerprint import Fingerprint
from segcore.pastkv.base import Tier
from segcore.pastkv.directory import STALE_S, LocalDisk, SharedDirectory
from segcore.pastkv.format import PAGE_TOKENS, BlockFormat
from segcore.pastkv.memory import MemoryTier, RowCache, Rows
from segcore.pastkv.redis import RedisTier
from tests.segcore.blocks import BLOCK_BYTES, TOKENS, block, bulk, key, same, same_tensors

FORMAT = BlockFormat(Fingerprint(model="test"))
FILE_BYTES = sum(map(len, FORMAT.encode(block(0))))
SLACK_BYTES = 200  # headers differ by some digits
KINDS = ["memory", "disk", "shared", "redis"]
MANY = 100


@pytest.fixture
def make_tier(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Tier]]:
    made: list[Tier] = []

    def make(kind: str, budget: int | None = None) -> Tier:
        if kind == "memory":
            made.append(MemoryTier("host", MANY * BLOCK_BYTES if budget is None else budget, torch.device("cpu")))
        elif kind == "disk":
            made.append(LocalDisk(tmp_path / "disk", FORMAT, budget))
        elif kind == "shared":
            made.append(SharedDirectory(tmp_path / "shared", "print", FORMAT, budget))
        else:
            made.append(RedisTier(request.getfixturevalue("redis_server").url, FORMAT, None))
        return made[-1]

    yield make
    for tier in made:
        tier.close()


def files(folder: Path, suffix: str = "safetensors") -> list[Path]:
    return sorted(folder.rglob(f"*.{suffix}"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tier_gives_back_what_it_got(make_tier, kind, dtype):
    tier = make_tier(kind)
    for seed, tokens in enumerate([1, 15, 16, 17, 40]):
        one = block(seed, dtype, tokens)
        one.kv_SC2D.view(-1)[0], one.kv_SC2D.view(-1)[-1] = torch.nan, -0.0
        tier.put(one)
        assert tier.holds(one.key)
        for rows in ([0], [tokens - 1, 0], list(range(tokens)), [tokens // 2] * 3, list(range(tokens))[::-1]):
            assert same(tier.rows(one.key, torch.tensor(rows)), one.kv_SC2D[rows])
        head = tier.head(one.key)
        assert same_tensors(head.index, one.index)
        assert same_tensors(head.boundary, one.boundary)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_counted_and_forgotten(make_tier, kind):
    tier = make_tier(kind)
    for seed in range(3):
        tier.put(block(seed))
        tier.put(block(seed))
    each = FILE_BYTES if kind in ("disk", "shared") else BLOCK_BYTES
    assert abs(tier.used_bytes - 3 * each) < SLACK_BYTES
    assert tier.keys == tuple(map(key, range(3)))
    tier.delete(key(1))
    tier.delete(key(1))
    assert tier.keys == (key(0), key(2))
    assert abs(tier.used_bytes - 2 * each) < SLACK_BYTES
    assert not tier.holds(key(1))
    for read in (lambda: tier.rows(key(1), torch.tensor([0])), lambda: tier.head(key(1))):
        with pytest.raises(BlockMissing):
            read()
    assert same(tier.rows(key(2), torch.tensor([5])), bulk(2)[[5]])


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_read_is_a_copy(make_tier, kind):
    tier = make_tier(kind)
    tier.put(block(0))
    tier.rows(key(0), torch.arange(TOKENS)).zero_()
    assert same(tier.rows(key(0), torch.arange(TOKENS)), bulk(0))


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_spare_blocks_make_room_in_the_order_given(make_tier, kind):
    tier = make_tier(kind, 3 * FILE_BYTES + SLACK_BYTES if kind == "disk" else 3 * BLOCK_BYTES)
    for seed in range(3):
        tier.put(block(seed))
    tier.put(block(3), spare=iter([key(1), key(0)]))
    assert set(tier.keys) == {key(0), key(2), key(3)}
    with pytest.raises(StorageFull):
        tier.put(block(4))
    assert set(tier.keys) == {key(0), key(2), key(3)}
    assert tier.used_bytes <= tier.budget_bytes
    assert not tier.holds(key(4))


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_block_beyond_the_budget_costs_no_other(make_tier, kind):
    tier = make_tier(kind, (FILE_BYTES if kind == "disk" else BLOCK_BYTES) - 100)
    small = block(0, tokens=8)
    tier.put(small)
    with pytest.raises(StorageFull):
        tier.put(block(1), spare=[small.key])
    assert tier.keys == (small.key,)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_keys_stand_in_order_of_use(make_tier, kind):
    tier = make_tier(kind)
    for seed in range(3):
        tier.put(block(seed))
    tier.rows(key(1), torch.tensor([0]))
    tier.head(key(0))
    assert tier.keys == (key(2), key(1), key(0))


def test_a_few_rows_cost_a_few_pages(tmp_path):
    one, read_bytes = block(0, torch.float64), 0
    data = b"".join(FORMAT.encode(one))

    def read(ranges):
        nonlocal read_bytes
        read_bytes += sum(stop - start for start, stop in ranges if start)
        return [data[start:stop] for start, stop in ranges]

    rows = torch.tensor([17, 16, 31])
    assert same(FORMAT.rows(one.key, read, rows), one.kv_SC2D[rows])
    assert read_bytes == PAGE_TOKENS * 2 * 2 * 4 * 8


@pytest.mark.parametrize("pages", [1, 3000])
def test_a_header_of_any_length_is_read(pages):
    one = block(0, tokens=pages * PAGE_TOKENS)
    data = b"".join(FORMAT.encode(one))
    got = FORMAT.rows(one.key, lambda ranges: [data[start:stop] for start, stop in ranges], torch.tensor([0, -1 % 16]))
    assert same(got, one.kv_SC2D[[0, 15]])


@pytest.mark.parametrize("kind", ["disk", "shared"])
def test_a_file_is_what_others_call_safetensors(make_tier, tmp_path, kind):
    make_tier(kind).put(block(0))
    (path,) = files(tmp_path)
    assert same(load_file(path)["kv"], bulk(0))
    length = int.from_bytes(path.read_bytes()[:8], "little")
    about = json.loads(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]["segcore"])
    assert about["fingerprint"]["model"] == "test"


def test_a_crash_before_the_rename_leaves_no_block(make_tier, tmp_path, monkeypatch):
    disk = make_tier("disk")

    def crash(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            disk.put(block(0))
    assert files(tmp_path, "partial")
    assert not disk.holds(key(0))
    assert disk.used_bytes == 0
    with pytest.raises(BlockMissing):
        disk.rows(key(0), torch.tensor([0]))
    disk.put(block(0))
    assert same(disk.rows(key(0), torch.tensor([0])), bulk(0)[[0]])


def test_a_failed_write_leaves_nothing(make_tier, tmp_path, monkeypatch):
    disk = make_tier("disk")

    def broken(source: object, target: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(TierUnavailable):
            disk.put(block(0))
    assert not files(tmp_path, "partial")
    assert (disk.used_bytes, disk.keys) == (0, ())


def test_a_block_appears_at_once(make_tier):
    """Readers beside a writer see a block whole or not at all."""
    disk, wrong, stop = make_tier("disk"), [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            for seed in range(30):
                if disk.holds(key(seed)):
                    try:
                        if not same(disk.rows(key(seed), torch.arange(TOKENS)), bulk(seed)):
                            wrong.append(seed)
                    except PastKVError as error:
                        wrong.append(error)

    reader = threading.Thread(target=look)
    reader.start()
    for seed in range(30):
        disk.put(block(seed))
    stop.set()
    reader.join()
    assert not wrong


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A process that holds a disk tier with block 0, and wrote it to a shared folder too: its id, its folder."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            disk = LocalDisk(tmp_path / "disk", FORMAT, None)
            disk.put(block(0))
            SharedDirectory(tmp_path / "shared", "print", FORMAT, None).put(block(0))
            os.write(send, str(disk.folder).encode())
            time.sleep(60)
        finally:
            os._exit(1)
    yield child, Path(os.read(receive, 10_000).decode())
    with suppress(ProcessLookupError, ChildProcessError):  # the test may have ended it
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.close(receive)
    os.close(send)


def test_two_processes_on_one_directory(make_tier, tmp_path, other_process):
    """Folders of dead processes go and those of live ones stay; shared blocks serve all and outlive their writer."""
    child, theirs = other_process
    ours, shared = make_tier("disk"), make_tier("shared")
    ours.put(block(1))
    assert set((tmp_path / "disk").glob("engine-*")) == {theirs, ours.folder}
    assert same(shared.rows(key(0), torch.tensor([3])), bulk(0)[[3]])
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    third = make_tier("disk")
    assert set((tmp_path / "disk").glob("engine-*")) == {ours.folder, third.folder}
    assert same(ours.rows(key(1), torch.tensor([1])), bulk(1)[[1]])
    assert same(shared.rows(key(0), torch.tensor([3])), bulk(0)[[3]])


def test_local_blocks_are_private_and_go_with_the_tier(make_tier, tmp_path):
    disk = make_tier("disk")
    disk.put(block(0))
    assert stat.S_IMODE(disk.folder.stat().st_mode) == 0o700
    disk.close()
    assert not list((tmp_path / "disk").glob("engine-*"))


@pytest.mark.parametrize("lost", ["engine", "everything"])
def test_a_removed_folder_is_made_again_and_still_locked(make_tier, tmp_path, lost):
    disk = make_tier("disk")
    disk.put(block(0))
    subprocess.run(["rm", "-rf", disk.folder if lost == "engine" else tmp_path / "disk"], check=True)
    with pytest.raises(BlockMissing):
        disk.rows(key(0), torch.tensor([0]))
    disk.put(block(1))
    assert (disk.keys, disk.used_bytes) == ((key(1),), tier_files_bytes(disk.folder))
    make_tier("disk")  # removes what is abandoned
    assert same(disk.rows(key(1), torch.tensor([0])), bulk(1)[[0]])


def tier_files_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_shared_directory_forgets_what_was_not_used_for_longest(make_tier, tmp_path):
    """Also what other fingerprints left, and what others wrote meanwhile."""
    other = SharedDirectory(tmp_path / "shared", "other", FORMAT, None)
    other.put(block(9))
    age(files(tmp_path)[0], 900)
    tier = make_tier("shared", 3 * FILE_BYTES + SLACK_BYTES)
    for seed in range(2):
        tier.put(block(seed))
        age(tier._path(key(seed)), 800 - seed)
    assert other.holds(key(9))
    tier.put(block(2))
    assert not other.holds(key(9))
    age(tier._path(key(2)), 600)
    tier._scan()
    tier.rows(key(0), torch.tensor([0]))  # now the one used last
    tier.put(block(3))
    assert [tier.holds(key(seed)) for seed in range(4)] == [True, False, True, True]
    assert tier_files_bytes(tmp_path) <= tier.budget_bytes


def test_a_shared_directory_is_not_listed_for_every_block(make_tier, tmp_path, monkeypatch):
    tier, scans = make_tier("shared", 50 * FILE_BYTES), []
    scan = tier._scan
    monkeypatch.setattr(tier, "_scan", lambda: (scans.append(1), scan()))
    for seed in range(20):
        tier.put(block(seed))
        assert tier.used_bytes == tier_files_bytes(tmp_path)
    assert not scans


def test_partial_files_of_dead_processes_go(make_tier, tmp_path):
    shared = make_tier("shared")
    shared.put(block(0))
    old, fresh = (files(tmp_path)[0].with_name(f"{name}.partial") for name in ("old", "fresh"))
    old.touch()
    fresh.touch()
    age(old, STALE_S + 60)
    make_tier("shared")
    assert files(tmp_path, "partial") == [fresh]


@pytest.mark.parametrize("kind", ["disk", "shared"])
def test_a_file_in_the_folders_place_is_refused(make_tier, tmp_path, kind):
    (tmp_path / kind).write_text("a file")
    with pytest.raises(TierUnavailable, match="can't be kept in"):
        make_tier(kind)


def test_redis_blocks_expire_when_nobody_reads_them(redis_server):
    tier = RedisTier(redis_server.url, FORMAT, 100)
    tier.put(block(0))
    (name,) = redis_server.client().keys()
    assert 90 < redis_server.client().ttl(name) <= 100
    for use in (lambda: tier.rows(key(0), torch.tensor([0])), lambda: tier.head(key(0)), lambda: tier.put(block(0))):
        redis_server.client().expire(name, 5)
        use()
        assert redis_server.client().ttl(name) > 90
    tier.close()


def test_a_redis_block_is_one_string_set_at_once(redis_server):
    with redis_server.client() as client:
        before = client.info("commandstats").get("cmdstat_set", {"calls": 0})["calls"]
        tier = RedisTier(redis_server.url, FORMAT, None)
        tier.put(block(0))
        assert client.dbsize() == 1
        assert client.info("commandstats")["cmdstat_set"]["calls"] == before + 1
        tier.close()


def test_a_wrong_address_is_refused_without_its_secret():
    with pytest.raises(ConfigError, match="isn't the address") as raised:
        RedisTier("redis://user:secret@host:port", FORMAT, None)
    assert "secret" not in raised.value.message


def test_rows_stay_within_their_budget():
    row_bytes = bulk(0)[[0]].nbytes
    cache = RowCache(10 * row_bytes)
    for name in "abc":
        cache.put(name, Rows(torch.arange(3), bulk(0)[:3]))
    cache.get("a")
    cache.put("d", Rows(torch.arange(3), bulk(0)[:3]))
    assert cache.keys == ("c", "a", "d")
    assert cache.used_bytes == 9 * row_bytes
    cache.put("a", Rows(torch.arange(11), bulk(0)[:11]))
    assert cache.keys == ("c", "d")
    while cache.delete_oldest():
        pass
    assert cache.used_bytes == 0


def test_rows_join_and_are_taken_in_any_order():
    some, others = torch.tensor([1, 7, 20]), torch.tensor([0, 9, 39])
    rows = Rows(some, bulk(0)[some]).joined(Rows(others, bulk(0)[others]))
    assert rows.lacking(torch.tensor([0, 1, 2])).tolist() == [2]
    wanted = torch.tensor([39, 0, 20, 20])
    assert same(rows.take(wanted), bulk(0)[wanted])
