"""The manager: budgets hold, nothing in use is lost, streams share blocks, and what is prefetched isn't read twice."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from segcore.config import CacheConfig, ConfigError
from segcore.errors import BlockMissing, StorageFull, TierUnavailable
from segcore.pastkv import guard
from segcore.pastkv.base import PastLayout
from segcore.pastkv.directory import DirectoryTier
from segcore.pastkv.manager import ROWS_SHARE, PastKVManager
from tests.segcore.blocks import (
    BLOCK_BYTES,
    BOUNDARY_BYTES,
    INDEX_BYTES,
    LAYOUT,
    TOKENS,
    boundary,
    bulk,
    close_segment,
    index,
    same,
    same_tensors,
    stream_of,
    tokens_of,
)

FILE_BYTES = 3000  # more than a block's file takes, less than two


@pytest.fixture
def make_past() -> Iterator[Callable[..., PastKVManager]]:
    made: list[PastKVManager] = []

    def make(*, blocks: float = 100, **options: object) -> PastKVManager:
        config = CacheConfig(host_bytes=int(blocks * BLOCK_BYTES), **options)  # type: ignore[arg-type]
        made.append(PastKVManager(config))
        return made[-1]

    yield make
    for past in made:
        past.check_integrity()
        past.close()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of blocks whose rows were read from a directory."""
    keys: list[str] = []
    rows = DirectoryTier.rows

    def counted(tier, key, rows_n):
        keys.append(key)
        return rows(tier, key, rows_n)

    monkeypatch.setattr(DirectoryTier, "rows", counted)
    return keys


def everything(*seeds: int) -> torch.Tensor:
    return torch.cat([bulk(seed) for seed in seeds])


def gathers(stream, *seeds: int) -> bool:
    return same(stream.gather(torch.arange(TOKENS * len(seeds))), everything(*seeds))


@pytest.mark.parametrize("host_blocks", [2.4, 3.5, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gather_gives_rows_by_position(make_past, tmp_path, dtype, host_blocks):
    layout = PastLayout(segment_tokens=TOKENS, cells=2, selectors=1, head_dim=4, dtype=dtype)
    past = make_past(blocks=host_blocks * dtype.itemsize / 2 + 0.5, directory=tmp_path)
    streams = []
    for start in (0, 10):
        stream = past.open_stream(layout)
        for seed in range(start, start + 3):
            stream.journal.extend(tokens_of(seed), [(stream.segments + 1) * TOKENS])
            stream.append(bulk(seed, dtype), index(seed, dtype))
            stream.complete(boundary(seed, dtype))
        streams.append((stream, torch.cat([bulk(seed, dtype) for seed in range(start, start + 3)])))
    for stream, kv_NC2D in streams:
        for positions in ([], [0], [119], [39, 40], [3, 17, 41, 79, 80, 118], list(range(120))):
            for shaped in (torch.tensor(positions, dtype=torch.long), torch.tensor([positions], dtype=torch.long)):
                assert same(stream.gather(shaped), kv_NC2D[positions])
        per_cell = torch.tensor([[0, 5, 40, 119], [5, 6, 80, 81]])
        expected = torch.stack([kv_NC2D[row, cell] for cell, row in enumerate(per_cell)], dim=1)
        assert same(stream.gather(per_cell), expected)


def test_a_block_owns_its_tensors(make_past, tmp_path):
    """Views of one storage, strides and gradients are the caller's; safetensors would refuse some of them."""
    past = make_past(directory=tmp_path)
    stream = past.open_stream(LAYOUT)
    both = torch.randn(2, 4, TOKENS).to(LAYOUT.dtype)
    stream.journal.extend(tokens_of(0), [TOKENS])
    kv = bulk(0).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    stream.append(kv, {"keys": both[:1].mT, "more": both[1:].mT})
    state = torch.arange(6.0)
    stream.complete({"a": state[:3], "b": state[3:], "t": state.view(2, 3).mT})
    kept = both.clone()
    both.zero_()
    state.zero_()
    past.settle()
    past._host.delete(stream.last_key)
    assert not past.faults
    head = past.head(stream.last_key)
    assert same_tensors(head.index, {"keys": kept[:1].mT.contiguous(), "more": kept[1:].mT.contiguous()})
    assert head.boundary["b"].tolist() == [3, 4, 5]
    assert head.boundary["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert same(stream.gather(torch.arange(TOKENS)), bulk(0))
    assert not stream.gather(torch.arange(TOKENS)).requires_grad


def test_host_memory_keeps_its_budget_and_the_rest_is_read(make_past, tmp_path):
    past = make_past(blocks=3, directory=tmp_path)
    stream = stream_of(past, *range(8))
    assert past.host_bytes <= 3 * BLOCK_BYTES
    assert gathers(stream, *range(8))
    assert past.host_bytes <= 3 * BLOCK_BYTES
    past.check_integrity()


def test_over_budget_without_a_slower_tier_is_refused_and_nothing_kept(make_past):
    past = make_past(blocks=2)
    stream = stream_of(past, 0, 1)
    for _ in range(2):
        with pytest.raises(StorageFull, match="raise host_bytes"):
            stream_of(past, 2)
        with pytest.raises(StorageFull):
            close_segment(stream, 2)
        stream.journal.truncate(2 * TOKENS)
    assert past.host_bytes == 2 * BLOCK_BYTES
    assert gathers(stream, 0, 1)
    stream.truncate(0)
    assert gathers(stream_of(past, 5, 6), 5, 6)


def test_a_boundary_beyond_the_budget_is_refused(make_past):
    past = make_past(blocks=2 - BOUNDARY_BYTES / BLOCK_BYTES / 2)
    stream = stream_of(past, 0)
    with pytest.raises(StorageFull):
        close_segment(stream, 1)
    assert not past.holds(stream.last_key)
    stream.truncate(1)
    past.check_integrity()
    assert past.host_bytes == BLOCK_BYTES


def test_blocks_in_use_stay_unless_held_elsewhere(make_past, tmp_path):
    """The disk takes two blocks of six: host memory keeps the other four, or refuses."""
    past = make_past(blocks=4.5, directory=tmp_path, disk_bytes=2 * FILE_BYTES)
    stream = stream_of(past, *range(6))
    past.settle()
    assert gathers(stream, *range(6))
    assert past.faults["disk.StorageFull"] >= 4
    with pytest.raises(StorageFull):
        close_segment(stream, 6)
    assert gathers(stream, *range(6))


def test_what_was_used_last_stays_in_host_memory(make_past, tmp_path, reads):
    past = make_past(blocks=4, directory=tmp_path)
    stream = stream_of(past, 0, 1, 2)
    past.settle()
    stream.gather(torch.tensor([0]))
    close_segment(stream, 3)
    close_segment(stream, 4)
    past.settle()
    stream.gather(torch.tensor([1]))
    assert not reads
    stream.gather(torch.tensor([TOKENS]))
    assert reads == [stream.keys[1]]


def test_a_failed_write_is_tried_again(make_past, tmp_path, monkeypatch):
    past = make_past(directory=tmp_path)
    put = DirectoryTier.put
    with monkeypatch.context() as patch:
        patch.setattr(DirectoryTier, "put", raising(StorageFull("full")))
        stream = stream_of(past, 0)
        past.settle()
    assert not past._disk.holds(stream.keys[0])
    monkeypatch.setattr(DirectoryTier, "put", put)
    close_segment(stream, 1)
    past.settle()
    assert all(past._disk.holds(key) for key in stream.keys)


def raising(error: Exception) -> Callable[..., None]:
    def act(*args: object, **kwargs: object) -> None:
        raise error

    return act


def test_a_bug_in_a_tier_is_logged_and_counted(make_past, tmp_path, monkeypatch, caplog):
    past = make_past(directory=tmp_path)
    monkeypatch.setattr(DirectoryTier, "put", raising(RuntimeError("a bug")))
    stream = stream_of(past, 0)
    past.settle()
    assert past.faults["disk.RuntimeError"] == 1
    assert "a bug" in caplog.text
    assert gathers(stream, 0)


def test_streams_of_equal_tokens_share_blocks(make_past, tmp_path):
    past = make_past(directory=tmp_path)
    first, second, other = stream_of(past, 0, 1), stream_of(past, 0, 1, 2), stream_of(past, 0, tenant="other")
    assert first.keys == second.keys[:2]
    assert other.keys[0] not in second.keys
    assert past.keys_in_use == dict(zip(second.keys, (2, 2, 1), strict=True)) | {other.keys[0]: 1}
    assert past.host_bytes == 4 * BLOCK_BYTES
    first.truncate(1)
    first.truncate(0)
    assert gathers(second, 0, 1, 2)
    assert past.keys_in_use[second.keys[0]] == 1


@pytest.mark.parametrize("first_released", [0, 1, 2])
@pytest.mark.parametrize("reuse", [True, False])
def test_forks_end_in_any_order(make_past, tmp_path, first_released, reuse):
    past = make_past(directory=tmp_path, reuse=reuse)
    stream = stream_of(past, 0, 1)
    fork = stream.fork()
    forks = [stream, fork, fork.fork()]
    close_segment(fork, 2)
    close_segment(stream, 3)
    seeds = [(0, 1, 3), (0, 1, 2), (0, 1)]
    past.settle()
    order = [first_released, *(i for i in range(3) if i != first_released)]
    for n, i in enumerate(order):
        forks[i].truncate(0)
        for j in order[n + 1 :]:
            assert gathers(forks[j], *seeds[j])
        past.check_integrity()
    if not reuse:
        assert past.used_bytes == {"host": 0, "disk": 0}
        assert not list(tmp_path.rglob("*.safetensors"))


def test_blocks_of_ended_streams_wait_for_the_next(make_past, tmp_path):
    past = make_past(blocks=3, directory=tmp_path, disk_bytes=4 * FILE_BYTES)
    stream = stream_of(past, 0, 1)
    keys = stream.keys
    past.settle()
    stream.truncate(0)
    assert all(map(past.holds, keys))
    again = past.open_stream(LAYOUT)
    assert same_tensors(again.adopt(keys[0]), boundary(0))
    assert gathers(again, 0)
    again.truncate(0)
    for seed in range(2, 12):  # others need the room
        stream_of(past, seed).truncate(0)
        past.settle()
    assert not any(map(past.holds, keys))


def test_room_is_taken_from_unused_blocks_first(make_past, tmp_path):
    past = make_past(directory=tmp_path, disk_bytes=3 * FILE_BYTES)
    used = stream_of(past, 0)
    stream_of(past, 1, 2).truncate(0)
    for seed in (3, 4):
        stream_of(past, seed)
    past.settle()
    assert past._disk.holds(used.keys[0])
    assert not past.faults


def test_the_disk_lets_go_of_what_the_shared_tier_holds(make_past, tmp_path):
    past = make_past(blocks=3, directory=tmp_path / "d", disk_bytes=2 * FILE_BYTES, shared=str(tmp_path / "s"))
    stream = stream_of(past, *range(6))
    past.settle()
    assert gathers(stream, *range(6))
    assert past._disk.holds(stream.keys[5])
    assert past.used_bytes["disk"] <= 2 * FILE_BYTES
    assert not past.faults


def test_an_incomplete_block_is_readable_but_not_adopted(make_past, tmp_path):
    past = make_past(directory=tmp_path)
    stream = past.open_stream(LAYOUT)
    close_segment(stream, 0, complete=False)
    assert gathers(stream, 0)
    assert not stream.available(stream.last_key)
    with pytest.raises(BlockMissing):
        past.open_stream(LAYOUT).adopt(stream.last_key)
    assert stream.intact() == 0
    stream.truncate(0)
    past.check_integrity()
    assert past.used_bytes == {"host": 0, "disk": 0}
    assert not list(tmp_path.rglob("*.safetensors"))


def test_adoption_keeps_to_the_budget_and_shares_one_index(make_past, tmp_path):
    first = make_past(shared=str(tmp_path))
    keys = stream_of(first, *range(10)).keys
    first.settle()
    second = make_past(blocks=4 * INDEX_BYTES / BLOCK_BYTES + 0.01, shared=str(tmp_path))
    one, other = second.open_stream(LAYOUT), second.open_stream(LAYOUT)
    for key in keys[:4]:
        one.adopt(key)
    with pytest.raises(StorageFull):
        one.adopt(keys[4])
    assert one.segments == 4
    for key in keys[:4]:
        other.adopt(key)
    assert all(a["keys"] is b["keys"] for a, b in zip(one.index, other.index, strict=True))
    assert not second.faults


def test_looking_for_a_block_is_no_fault(make_past, tmp_path):
    past = make_past(directory=tmp_path / "d", shared=str(tmp_path / "s"))
    with pytest.raises(BlockMissing):
        past.open_stream(LAYOUT).adopt("00" * 20)
    other = make_past(shared=str(tmp_path / "s"))
    stream = stream_of(other, 0)
    other.settle()
    past.open_stream(LAYOUT).adopt(stream.keys[0])  # not on disk, but shared
    assert not past.faults


def test_a_lost_block_is_counted_once_and_written_again(make_past, tmp_path):
    past = make_past(blocks=3.5, directory=tmp_path)
    stream = stream_of(past, 0, 1, 2)
    past.settle()
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    close_segment(stream, 3)  # needs room: finds out, and writes one block again
    past.settle()
    assert past.faults["disk.BlockMissing"] >= 1


def test_an_index_that_is_searched_counts(make_past, tmp_path):
    past = make_past(blocks=2.2, directory=tmp_path)
    stream = stream_of(past, *range(4))
    past.settle()
    past._host.close()
    for key in stream.keys:
        past._rows.delete(key)
    assert past.host_bytes == 4 * INDEX_BYTES


@pytest.mark.parametrize("reuse", [True, False])
def test_closing_while_writes_are_pending(make_past, tmp_path, monkeypatch, reuse):
    put = DirectoryTier.put

    def slow(tier, block, spare=()):
        time.sleep(0.05)
        put(tier, block, spare)

    monkeypatch.setattr(DirectoryTier, "put", slow)
    past = make_past(directory=tmp_path / "d", shared=str(tmp_path / "s"), reuse=reuse)
    stream = stream_of(past, *range(4))
    stream.truncate(2)
    past.close()
    assert not list((tmp_path / "d").glob("engine-*"))
    assert len(list((tmp_path / "s").rglob("*.safetensors"))) >= 2
    stream.truncate(0)


def test_a_stream_that_ends_while_it_is_written_leaves_nothing(make_past, tmp_path, monkeypatch):
    put, begun, go = DirectoryTier.put, threading.Event(), threading.Event()

    def held(tier, block, spare=()):
        begun.set()
        assert go.wait(20)
        put(tier, block, spare)

    monkeypatch.setattr(DirectoryTier, "put", held)
    past = make_past(directory=tmp_path, reuse=False)
    stream = stream_of(past, 0, 1)
    assert begun.wait(20)
    stream.truncate(0)
    go.set()
    past._writer.submit(lambda: None).result()
    assert not list(tmp_path.rglob("*.safetensors"))
    assert past.used_bytes == {"host": 0, "disk": 0}


def test_host_memory_waits_for_a_slow_tier(make_past, tmp_path, monkeypatch):
    put = DirectoryTier.put

    def slow(tier, block, spare=()):
        time.sleep(0.02)
        put(tier, block, spare)

    monkeypatch.setattr(DirectoryTier, "put", slow)
    past = make_past(blocks=2.5, directory=tmp_path)
    stream = stream_of(past, *range(8))
    assert past.host_bytes <= 2.5 * BLOCK_BYTES
    assert gathers(stream, *range(8))


def test_blocks_that_are_being_written_count(make_past, tmp_path, monkeypatch):
    """Even if nobody uses them any more: else a slow disk's queue would hold memory that no budget knows of."""
    put, go = DirectoryTier.put, threading.Event()

    def held(tier, block, spare=()):
        assert go.wait(20)
        put(tier, block, spare)

    monkeypatch.setattr(DirectoryTier, "put", held)
    past = make_past(blocks=2.5, directory=tmp_path)
    for seed in (0, 1):
        stream_of(past, seed).truncate(0)
    third = threading.Thread(target=stream_of, args=(past, 2))
    third.start()
    third.join(0.2)
    waited, blocks = third.is_alive(), len(past._host.keys)
    go.set()
    third.join()
    assert waited
    assert blocks == 2


def test_the_books_are_free_while_a_tier_is_slow(make_past, tmp_path, monkeypatch):
    """A tier that hangs in a look-up, a read or a write holds nobody up who doesn't need it."""
    past = make_past(blocks=2.4, directory=tmp_path)
    stream = stream_of(past, 0, 1)
    past.settle()
    begun, go = threading.Event(), threading.Event()

    def hang(*args: object) -> bool:
        begun.set()
        assert go.wait(20)
        return True

    monkeypatch.setattr(DirectoryTier, "holds", hang)
    preparing = threading.Thread(target=close_segment, args=(stream, 2))
    preparing.start()
    assert begun.wait(20)
    free = past._lock.acquire(timeout=5)
    go.set()
    assert free
    past._lock.release()
    preparing.join()


def test_a_tier_that_fails_is_left_alone_for_a_while(make_past, tmp_path, monkeypatch):
    past = make_past(shared=str(tmp_path))
    stream = stream_of(past, 0)
    past.settle()
    tries = []

    def gone(tier, key):
        tries.append(key)
        raise TierUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(DirectoryTier, "holds", gone)
        for _ in range(10):
            assert not past.holds("absent")
    assert len(tries) == 1
    assert past.faults["shared.TierUnavailable"] == 1
    past._host.delete(stream.keys[0])
    with pytest.raises(TierUnavailable):
        stream.gather(torch.tensor([0]))
    monkeypatch.setattr(guard.time, "monotonic", lambda: time.perf_counter() + 1e9)
    assert gathers(stream, 0)


def test_an_unknown_kind_of_shared_tier_is_refused():
    with pytest.raises(ConfigError, match="redis://"):
        PastKVManager(CacheConfig(shared="s3://bucket"))


def slower_only(make_past, tmp_path, seeds=4, **options):
    """A stream whose blocks are on disk alone, and much free host memory."""
    past = make_past(directory=tmp_path, **options)
    stream = stream_of(past, *range(seeds))
    past.settle()
    for key in stream.keys:
        past._host.delete(key)
    return past, stream


def test_what_was_prefetched_is_not_read_again(make_past, tmp_path, reads):
    past, stream = slower_only(make_past, tmp_path)
    positions = torch.tensor([3, 4, 50, 51, 119, 159])
    stream.prefetch(positions)
    past.settle()
    assert len(reads) == 4
    before = len(reads)
    assert same(stream.gather(positions), everything(*range(4))[positions])
    assert same(stream.gather(positions[1:3]), everything(*range(4))[positions[1:3]])
    assert len(reads) == before
    more = torch.tensor([3, 5])  # only what is missing is read
    assert same(stream.gather(more), everything(*range(4))[more])
    assert reads[before:] == [stream.keys[0]]


def test_a_gather_does_not_wait_for_other_blocks_prefetch(make_past, tmp_path, monkeypatch):
    """A prefetch that is under way is waited for, one that hasn't begun is taken over."""
    past, stream = slower_only(make_past, tmp_path)
    rows, go, begun = DirectoryTier.rows, threading.Event(), threading.Event()
    asked = []

    def held(tier, key, rows_n):
        asked.append(key)
        if key == stream.keys[0]:
            begun.set()
            assert go.wait(20)
        return rows(tier, key, rows_n)

    monkeypatch.setattr(DirectoryTier, "rows", held)
    past._reader = ThreadPoolExecutor(1)
    stream.prefetch(torch.tensor([0, TOKENS]))
    assert begun.wait(20)
    assert same(stream.gather(torch.tensor([TOKENS])), bulk(1)[[0]])
    threading.Timer(0.05, go.set).start()
    assert same(stream.gather(torch.tensor([0])), bulk(0)[[0]])
    assert sorted(asked) == sorted(stream.keys[:2])


def test_prefetch_keeps_to_the_budget_and_gives_way_to_blocks(make_past, tmp_path):
    past, stream = slower_only(make_past, tmp_path, seeds=12, blocks=12)
    stream.prefetch(torch.arange(12 * TOKENS))
    past.settle()
    past.check_integrity()
    assert 0 < past._rows.used_bytes <= 12 * BLOCK_BYTES // ROWS_SHARE
    for seed in range(12, 40):
        close_segment(stream, seed)
        stream.prefetch(torch.arange(0, stream.segments * TOKENS, 7))
        assert past.host_bytes <= 12 * BLOCK_BYTES
    assert gathers(stream, *range(40))


def test_a_wrong_guess_costs_only_its_reads(make_past, tmp_path, reads):
    past, stream = slower_only(make_past, tmp_path)
    stream.prefetch(torch.tensor([0, 1]))
    past.settle()
    assert same(stream.gather(torch.tensor([90])), everything(*range(4))[[90]])
    assert reads == [stream.keys[0], stream.keys[2]]
    stream.truncate(0)
    assert past.host_bytes == 0


def test_nothing_is_prefetched_that_is_in_memory(make_past, tmp_path, reads):
    past = make_past(directory=tmp_path)
    stream = stream_of(past, 0, 1)
    stream.prefetch(torch.arange(2 * TOKENS))
    past.settle()
    assert not reads
    assert make_past().open_stream(LAYOUT).prefetch(torch.tensor([], dtype=torch.long)) is None


def test_a_fault_in_prefetch_is_counted_and_harmless(make_past, tmp_path):
    past, stream = slower_only(make_past, tmp_path)
    path = past._disk._path(stream.keys[0])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the last page
    path.write_bytes(data)
    past._disk._path(stream.keys[1]).unlink()
    stream.prefetch(torch.arange(4 * TOKENS))
    past.settle()
    assert past.faults == {"disk.BlockDamaged": 1, "disk.BlockMissing": 1}
    for segment in (0, 1):
        with pytest.raises(BlockMissing) as raised:
            stream.gather(torch.tensor([segment * TOKENS]))
        assert raised.value.details["segment"] == str(segment)
    positions = torch.arange(2 * TOKENS, 4 * TOKENS)
    assert same(stream.gather(positions), everything(*range(4))[positions])


def test_a_stream_that_ends_during_prefetch_leaves_nothing(make_past, tmp_path):
    past, stream = slower_only(make_past, tmp_path)
    for _ in range(20):
        fork = stream.fork()
        fork.prefetch(torch.arange(4 * TOKENS))
        fork.truncate(0)
    stream.prefetch(torch.arange(4 * TOKENS))
    stream.truncate(0)
    past.check_integrity()
    assert past.host_bytes == 0


def test_many_threads_keep_the_books(make_past, tmp_path):
    """Streams that share blocks, each on a thread of its own, in little memory."""
    past = make_past(blocks=9, directory=tmp_path, disk_bytes=40 * FILE_BYTES)
    wrong: list[object] = []

    def live(own: int) -> None:
        try:
            for round_ in range(6):
                seeds = (0, 1, 100 + own * 10 + round_, 2)
                stream = past.open_stream(LAYOUT)
                for seed in seeds:
                    close_segment(stream, seed)
                    stream.prefetch(torch.arange(0, stream.segments * TOKENS, 3))
                if not gathers(stream, *seeds):
                    wrong.append(seeds)
                fork = stream.fork()
                stream.truncate(1)
                if not gathers(fork, *seeds):
                    wrong.append(seeds)
                fork.truncate(0)
                stream.truncate(0)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=live, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not [w for w in wrong if not isinstance(w, BlockMissing)], wrong


class Streams(RuleBasedStateMachine):
    """Streams open, grow, fork and end in little memory above a small disk, beside lists of what they hold."""

    which, seeds = st.integers(0, 2), st.integers(0, 3)

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.past = PastKVManager(
            CacheConfig(host_bytes=int(4.2 * BLOCK_BYTES), directory=Path(self.folder.name), disk_bytes=5 * FILE_BYTES)
        )
        self.streams = {i: self.past.open_stream(LAYOUT) for i in range(3)}
        self.model: dict[int, tuple[int, ...]] = dict.fromkeys(range(3), ())

    def teardown(self) -> None:
        for stream in self.streams.values():
            stream.truncate(0)
        self.past.check_integrity()
        self.past.close()
        self.folder.cleanup()

    @rule(i=which, seed=seeds)
    def append(self, i: int, seed: int) -> None:
        stream = self.streams[i]
        try:
            close_segment(stream, seed)
            self.model[i] += (seed,)
        except StorageFull:  # only when there is more than both tiers take
            assert len(set().union(*map(self.prefixes, self.model.values()))) >= 4
            stream.truncate(len(self.model[i]))
            stream.journal.truncate(stream.segments * TOKENS)

    @staticmethod
    def prefixes(seeds: tuple[int, ...]) -> set[tuple[int, ...]]:
        return {seeds[: n + 1] for n in range(len(seeds))}

    @rule(i=which, seed=seeds)
    def abandon(self, i: int, seed: int) -> None:
        """A segment closes, but the state after it isn't reached."""
        stream, before = self.streams[i], len(self.model[i])
        with suppress(StorageFull):
            close_segment(stream, seed, complete=False)
        stream.truncate(before)
        stream.journal.truncate(before * TOKENS)

    @rule(i=which, j=which)
    def fork(self, i: int, j: int) -> None:
        self.streams[j].truncate(0)
        if i == j:
            self.streams[j], self.model[j] = self.past.open_stream(LAYOUT), ()
        else:
            self.streams[j], self.model[j] = self.streams[i].fork(), self.model[i]

    @rule(i=which, data=st.data())
    def truncate(self, i: int, data: st.DataObject) -> None:
        segments = data.draw(st.integers(0, len(self.model[i])))
        self.streams[i].truncate(segments)
        self.streams[i].journal.truncate(segments * TOKENS)
        self.model[i] = self.model[i][:segments]

    @rule(i=which, data=st.data())
    def read(self, i: int, data: st.DataObject) -> None:
        if self.model[i]:
            last = len(self.model[i]) * TOKENS - 1
            chosen = data.draw(st.lists(st.integers(0, last), unique=True, max_size=12).map(sorted))
            if data.draw(st.booleans()):
                self.streams[i].prefetch(torch.tensor(chosen, dtype=torch.long))
            got = self.streams[i].gather(torch.tensor(chosen, dtype=torch.long))
            assert same(got, everything(*self.model[i])[chosen])

    @rule(i=which)
    def adopt(self, i: int) -> None:
        """A new stream begins as stream i did, as far as it is there: all of it is in use, so all of it is."""
        again = self.past.open_stream(LAYOUT)
        for n, key in enumerate(self.streams[i].keys):
            assert again.available(key)
            assert same_tensors(again.adopt(key), boundary(self.model[i][n]))
        again.truncate(0)

    @invariant()
    def the_books_balance(self) -> None:
        self.past.check_integrity()
        assert self.past.host_bytes <= 4.2 * BLOCK_BYTES
        uses: dict[str, int] = {}
        for stream in self.streams.values():
            for key in stream.keys:
                uses[key] = uses.get(key, 0) + 1
            assert stream.intact() == stream.segments
        assert self.past.keys_in_use == uses


Streams.TestCase.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
test_streams_equal_lists = Streams.TestCase
