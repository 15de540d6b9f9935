"""The manager: rows by position, budgets of every tier, and what stays where."""

from __future__ import annotations

import pytest
import torch

from segcore.config import CacheConfig, ConfigError
from segcore.errors import StorageFull
from segcore.pastkv.base import PastLayout
from segcore.pastkv.manager import PastKVManager
from tests.segcore.blocks import (
    BLOCK_BYTES,
    BOUNDARY_BYTES,
    FILE_BYTES,
    INDEX_BYTES,
    LAYOUT,
    TOKENS,
    boundary,
    bulk,
    close_segment,
    gathers,
    index,
    same,
    same_tensors,
    stream_of,
    tokens_of,
)


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


def test_an_unknown_kind_of_shared_tier_is_refused():
    with pytest.raises(ConfigError, match="redis://"):
        PastKVManager(CacheConfig(shared="s3://bucket"))
