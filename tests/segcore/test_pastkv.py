"""Past KV: what is put comes back bit for bit or as a typed error, budgets hold, and nothing is left behind."""

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, closing

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from segcore.pastkv.disk import PAGE_TOKENS, DiskTier
from segcore.pastkv.host import HostTier

from segcore.config import CacheConfig
from segcore.errors import BlockDamaged, BlockMissing, PastKVError, StorageFull
from segcore.pastkv.base import BlockKey, PastLayout
from segcore.pastkv.manager import PastKVManager

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
KEY = BlockKey(3, 1)
LAYOUT = PastLayout(segment_tokens=40, cells=2, selectors=1, head_dim=4, dtype=torch.bfloat16)
BLOCK_BYTES = 40 * LAYOUT.block_bytes_per_token
INDEX_BYTES = 40 * LAYOUT.index_bytes_per_token


def random_block(seed: int = 0, dtype: torch.dtype = torch.bfloat16, tokens: int = 40) -> torch.Tensor:
    return torch.randn((tokens, 2, 2, 4), generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_keys(seed: int = 0) -> torch.Tensor:
    return torch.randn((1, 40, 4), generator=torch.Generator().manual_seed(-seed - 1)).to(LAYOUT.dtype)


def manager(directory=None, *, blocks=6, disk_bytes=None) -> PastKVManager:
    """A manager whose host memory holds so many blocks beside six blocks' selector keys."""
    host_bytes = blocks * BLOCK_BYTES + 6 * INDEX_BYTES
    return PastKVManager(CacheConfig(host_bytes=host_bytes, disk_bytes=disk_bytes, directory=directory))


def stream_of(past: PastKVManager, segments: int):
    stream, blocks = past.open_stream(LAYOUT), [random_block(i) for i in range(segments)]
    for i, block in enumerate(blocks):
        stream.append(block, random_keys(i))
    return stream, torch.cat(blocks)


def files(directory):
    return sorted(directory.rglob("*.safetensors"))


@pytest.fixture
def opened():
    """Lets a test open tiers and managers that are closed at its end."""
    with ExitStack() as stack:
        yield lambda closable: stack.enter_context(closing(closable))


@pytest.fixture(params=["host", "disk"])
def tier(request, tmp_path, opened):
    return HostTier() if request.param == "host" else opened(DiskTier(tmp_path, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 40])
def test_a_tier_gives_back_what_it_got(tier, dtype, tokens):
    block = random_block(1, dtype, tokens)
    block.view(-1)[0], block.view(-1)[-1] = torch.nan, -0.0
    tier.put(KEY, block)
    for rows in ([0], [tokens - 1, 0], list(range(tokens)), [tokens // 2] * 3):
        got = tier.rows(KEY, torch.tensor(rows))
        assert got.dtype == dtype
        assert torch.equal(got.view(torch.uint8), block[rows].view(torch.uint8))


def test_tiers_count_bytes_and_forget(tier):
    keys = [BlockKey(0, 0), BlockKey(0, 1), BlockKey(1, 0)]
    for i, key in enumerate(keys):
        tier.put(key, random_block(i))
    assert tier.used_bytes == 3 * BLOCK_BYTES
    tier.delete(keys[1])
    tier.delete(keys[1])
    assert tier.used_bytes == 2 * BLOCK_BYTES
    with pytest.raises(BlockMissing):
        tier.rows(keys[1], torch.tensor([0]))
    assert torch.equal(tier.rows(keys[2], torch.tensor([5])), random_block(2)[[5]])


def test_host_evicts_the_least_recently_read():
    host = HostTier()
    for i in range(4):
        host.put(BlockKey(0, i), random_block(i))
    host.rows(BlockKey(0, 0), torch.tensor([0]))
    host.evict_to(2 * BLOCK_BYTES)
    assert [BlockKey(0, i) in host for i in range(4)] == [True, False, False, True]
    assert host.used_bytes == 2 * BLOCK_BYTES


def test_rows_are_copies():
    """A block never changes: not through what was read of it."""
    host = HostTier()
    host.put(KEY, random_block())
    host.rows(KEY, torch.arange(40)).zero_()
    assert torch.equal(host.rows(KEY, torch.arange(40)), random_block())


@pytest.mark.parametrize("page", [0, 1, 2])
def test_a_flipped_byte_damages_the_rows_of_its_page_only(tmp_path, opened, page):
    disk = opened(DiskTier(tmp_path, None))
    disk.put(KEY, random_block())
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    at = data.index(bytes(random_block()[page * PAGE_TOKENS].view(torch.uint8).flatten().tolist()))
    data[at + 3] ^= 0x10
    path.write_bytes(data)
    for row in range(40):
        if row // PAGE_TOKENS == page:
            with pytest.raises(BlockDamaged):
                disk.rows(KEY, torch.tensor([row]))
        else:
            assert torch.equal(disk.rows(KEY, torch.tensor([row])), random_block()[[row]])
    with pytest.raises(BlockDamaged):
        disk.rows(KEY, torch.arange(40))


def test_no_flipped_byte_anywhere_is_silent(tmp_path, opened):
    """Header, checksums and contents: the rows are right or the error is typed."""
    disk, block = opened(DiskTier(tmp_path, None)), random_block(tokens=20)
    disk.put(KEY, block)
    (path,) = files(tmp_path)
    good = path.read_bytes()
    damaged = 0
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x01]) + good[at + 1 :])
        try:
            assert torch.equal(disk.rows(KEY, torch.arange(20)), block)
        except BlockDamaged:
            damaged += 1
    assert damaged >= block.nbytes + 2 * 8


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_damaged(tmp_path, opened, kept):
    disk = opened(DiskTier(tmp_path, None))
    disk.put(KEY, random_block())
    (path,) = files(tmp_path)
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.raises(BlockDamaged):
        disk.rows(KEY, torch.tensor([0]))


def test_a_missing_file_is_missing(tmp_path, opened):
    disk = opened(DiskTier(tmp_path, None))
    disk.put(KEY, random_block())
    files(tmp_path)[0].unlink()
    with pytest.raises(BlockMissing):
        disk.rows(KEY, torch.tensor([0]))


def test_a_file_in_the_directorys_place_is_an_error(tmp_path):
    (tmp_path / "taken").write_text("a file")
    for directory in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(PastKVError, match="can't be kept in"):
            DiskTier(directory, None)


def test_a_failed_write_leaves_nothing(tmp_path, opened):
    disk = opened(DiskTier(tmp_path, None))
    in_the_way = disk.folder / f"{KEY.stream:08d}" / f"{KEY.segment:08d}.safetensors"
    in_the_way.mkdir(parents=True)
    with pytest.raises(PastKVError, match="can't write past KV"):
        disk.put(KEY, random_block())
    assert disk.used_bytes == 0
    assert list(in_the_way.parent.iterdir()) == [in_the_way]
    in_the_way.rmdir()
    disk.put(KEY, random_block())
    assert torch.equal(disk.rows(KEY, torch.tensor([0])), random_block()[[0]])


def test_a_folder_that_vanished_is_an_error(tmp_path, opened):
    disk = opened(DiskTier(tmp_path, None))
    disk.put(KEY, random_block())
    shutil.rmtree(disk.folder)
    with pytest.raises(BlockMissing):
        disk.rows(KEY, torch.tensor([0]))
    with pytest.raises(PastKVError, match="can't write past KV"):
        disk.put(BlockKey(9, 9), random_block())


def test_a_partial_file_is_no_block(tmp_path, opened):
    disk = opened(DiskTier(tmp_path, None))
    disk.put(KEY, random_block())
    files(tmp_path)[0].rename(files(tmp_path)[0].with_suffix(".partial"))
    with pytest.raises(BlockMissing):
        disk.rows(KEY, torch.tensor([0]))


def test_disk_budget_is_exact(tmp_path, opened):
    disk = opened(DiskTier(tmp_path, 2 * BLOCK_BYTES))
    disk.put(BlockKey(0, 0), random_block())
    disk.put(BlockKey(0, 1), random_block())
    with pytest.raises(StorageFull):
        disk.put(BlockKey(0, 2), random_block())
    assert disk.used_bytes == 2 * BLOCK_BYTES
    assert len(files(tmp_path)) == 2
    disk.delete(BlockKey(0, 0))
    disk.put(BlockKey(0, 2), random_block(2))
    assert torch.equal(disk.rows(BlockKey(0, 2), torch.tensor([7])), random_block(2)[[7]])


def test_close_removes_the_folder(tmp_path, opened):
    disk = opened(DiskTier(tmp_path, None))
    disk.put(KEY, random_block())
    disk.close()
    assert list(tmp_path.glob("engine-*")) == []


HOLD = """
import sys
from pathlib import Path
import torch
from segcore.pastkv.base import BlockKey
from segcore.pastkv.disk import DiskTier
tier = DiskTier(Path(sys.argv[1]), None)
tier.put(BlockKey(0, 0), torch.zeros(4, 1, 2, 4))
print(tier.folder, flush=True)
sys.stdin.read()
"""


def test_folders_of_ended_processes_are_removed_and_of_live_ones_kept(tmp_path, opened):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            theirs = holder.stdout.readline().strip()
            ours = opened(DiskTier(tmp_path, None))
            ours.put(KEY, random_block())
            assert {str(folder) for folder in tmp_path.glob("engine-*")} == {theirs, str(ours.folder)}
            assert len(files(tmp_path)) == 2
        finally:
            holder.kill()
    third = opened(DiskTier(tmp_path, None))
    assert set(tmp_path.glob("engine-*")) == {ours.folder, third.folder}
    assert torch.equal(ours.rows(KEY, torch.tensor([1])), random_block()[[1]])


@pytest.mark.parametrize("host_blocks", [0, 1, 24])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_gives_rows_by_position(tmp_path, opened, dtype, host_blocks):
    layout = PastLayout(segment_tokens=40, cells=2, selectors=1, head_dim=4, dtype=dtype)
    past = opened(manager(tmp_path, blocks=host_blocks))
    first, second = past.open_stream(layout), past.open_stream(layout)
    for i in range(3):
        first.append(random_block(i, dtype), random_keys(i))
        second.append(random_block(10 + i, dtype), random_keys(10 + i))
    for stream, start in ((first, 0), (second, 10)):
        kv_NC2D = torch.cat([random_block(start + i, dtype) for i in range(3)])
        for positions in ([], [0], [119], [39, 40], [3, 17, 41, 79, 80, 118], list(range(120))):
            got = stream.gather(torch.tensor(positions, dtype=torch.long))
            assert got.dtype == dtype
            assert torch.equal(got, kv_NC2D[positions])


def test_selector_keys_come_in_stream_order():
    stream, _ = stream_of(manager(), 4)
    assert stream.segments == 4
    for _ in range(2):
        assert torch.equal(torch.cat(list(stream.selector_keys()), dim=1), torch.cat([*map(random_keys, range(4))], 1))


def test_stored_tensors_carry_no_gradient():
    stream = manager().open_stream(LAYOUT)
    stream.append(random_block().requires_grad_(), random_keys().requires_grad_())
    assert not stream.gather(torch.tensor([1])).requires_grad
    assert not any(keys.requires_grad for keys in stream.selector_keys())


def test_host_memory_keeps_its_budget_and_the_rest_is_read_from_disk(tmp_path, opened):
    past = opened(manager(tmp_path, blocks=2))
    stream, kv_NC2D = stream_of(past, 6)
    assert past.host_bytes == 2 * BLOCK_BYTES + 6 * INDEX_BYTES
    assert past.disk_bytes == 6 * BLOCK_BYTES
    assert torch.equal(stream.gather(torch.arange(240)), kv_NC2D)
    files(tmp_path)[0].unlink()
    with pytest.raises(BlockMissing):
        stream.gather(torch.tensor([0]))
    files(tmp_path)[-1].unlink()  # the newest block is in host memory, too
    assert torch.equal(stream.gather(torch.tensor([239])), kv_NC2D[[239]])


def test_selector_keys_crowd_blocks_out_of_host_memory(tmp_path, opened):
    """The budget is for both; what can't leave comes first."""
    past = opened(PastKVManager(CacheConfig(host_bytes=BLOCK_BYTES + INDEX_BYTES, directory=tmp_path)))
    stream, kv_NC2D = stream_of(past, 1)
    assert past.host_bytes == BLOCK_BYTES + INDEX_BYTES
    stream.append(random_block(1), random_keys(1))
    assert past.host_bytes == 2 * INDEX_BYTES
    assert torch.equal(stream.gather(torch.arange(40)), kv_NC2D)


def test_over_budget_without_a_disk_is_refused_and_nothing_kept():
    past = PastKVManager(CacheConfig(host_bytes=2 * (BLOCK_BYTES + INDEX_BYTES)))
    stream, kv_NC2D = stream_of(past, 2)
    before = past.host_bytes
    assert before == 2 * (BLOCK_BYTES + INDEX_BYTES)
    for _ in range(2):
        with pytest.raises(StorageFull):
            stream.append(random_block(2), random_keys(2))
    assert past.host_bytes == before
    assert stream.segments == 2
    assert torch.equal(stream.gather(torch.arange(80)), kv_NC2D)
    stream.drop()
    stream_of(past, 2)


def test_a_full_disk_is_refused_and_nothing_kept(tmp_path, opened):
    past = opened(manager(tmp_path, disk_bytes=2 * BLOCK_BYTES))
    stream, kv_NC2D = stream_of(past, 2)
    before = past.host_bytes, past.disk_bytes
    with pytest.raises(StorageFull):
        stream.append(random_block(2), random_keys(2))
    assert (past.host_bytes, past.disk_bytes) == before
    assert (stream.segments, len(files(tmp_path))) == (2, 2)
    assert torch.equal(stream.gather(torch.arange(80)), kv_NC2D)


def test_selector_keys_beyond_the_budget_are_refused_before_the_disk_is_written(tmp_path, opened):
    past = opened(PastKVManager(CacheConfig(host_bytes=INDEX_BYTES, directory=tmp_path)))
    stream, _ = stream_of(past, 1)
    with pytest.raises(StorageFull):
        stream.append(random_block(1), random_keys(1))
    assert (past.host_bytes, past.disk_bytes, len(files(tmp_path))) == (INDEX_BYTES, BLOCK_BYTES, 1)


@pytest.mark.parametrize("on_disk", [True, False])
def test_drop_frees_everything_of_its_stream_alone(tmp_path, opened, on_disk):
    past = opened(manager(tmp_path if on_disk else None))
    kept, kept_NC2D = stream_of(past, 1)
    one = past.host_bytes, past.disk_bytes
    dropped, _ = stream_of(past, 3)
    dropped.drop()
    dropped.drop()
    assert (past.host_bytes, past.disk_bytes) == one
    assert torch.equal(kept.gather(torch.arange(40)), kept_NC2D)
    with pytest.raises(BlockMissing):
        dropped.gather(torch.tensor([0]))
    kept.drop()
    assert (past.host_bytes, past.disk_bytes) == (0, 0)
    assert files(tmp_path) == []


def test_manager_close_releases_everything(tmp_path, opened):
    past = opened(manager(tmp_path))
    stream_of(past, 2)
    past.close()
    assert list(tmp_path.glob("engine-*")) == []


class ManagerMachine(RuleBasedStateMachine):
    """Streams come, grow, are read and go, in little memory without a disk, beside a plain dict of tensors."""

    streams = st.integers(0, 2)

    def __init__(self):
        super().__init__()
        self.budget = 4 * BLOCK_BYTES + 5 * INDEX_BYTES
        self.past = PastKVManager(CacheConfig(host_bytes=self.budget))
        self.opened, self.model, self.count = {}, {}, 0

    def fits(self, segments: int) -> bool:
        return segments * (BLOCK_BYTES + INDEX_BYTES) <= self.budget

    @rule(i=streams)
    def append(self, i):
        stream = self.opened.setdefault(i, self.past.open_stream(LAYOUT))
        self.count += 1
        if self.fits(self.held + 1):
            stream.append(random_block(self.count), random_keys(self.count))
            self.model[i] = torch.cat([self.model.get(i, random_block()[:0]), random_block(self.count)])
        else:
            with pytest.raises(StorageFull):
                stream.append(random_block(self.count), random_keys(self.count))

    @precondition(lambda self: self.model)
    @rule(i=streams, data=st.data())
    def gather(self, i, data):
        if i in self.model:
            chosen = data.draw(st.lists(st.integers(0, len(self.model[i]) - 1), unique=True).map(sorted))
            assert torch.equal(self.opened[i].gather(torch.tensor(chosen, dtype=torch.long)), self.model[i][chosen])

    @rule(i=streams)
    def drop(self, i):
        if i in self.opened:
            self.opened.pop(i).drop()
            self.model.pop(i, None)

    @property
    def held(self) -> int:
        return sum(len(kv_NC2D) for kv_NC2D in self.model.values()) // 40

    @invariant()
    def bytes_are_counted(self):
        assert self.past.host_bytes == self.held * (BLOCK_BYTES + INDEX_BYTES)


ManagerMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
test_manager_equals_a_dict = ManagerMachine.TestCase
