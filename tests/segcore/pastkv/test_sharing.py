"""Streams share blocks: by equal tokens, as forks, with those that ended; each block goes with its last user."""

from __future__ import annotations

import pytest

from segcore.errors import BlockMissing, StorageFull
from tests.segcore.blocks import (
    BLOCK_BYTES,
    FILE_BYTES,
    INDEX_BYTES,
    LAYOUT,
    boundary,
    close_segment,
    gathers,
    same_tensors,
    stream_of,
)


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


def test_an_incomplete_block_is_readable_but_not_adopted(make_past, tmp_path):
    past = make_past(directory=tmp_path)
    stream = past.open_stream(LAYOUT)
    close_segment(stream, 0, complete=False)
    assert gathers(stream, 0)
    assert stream.restore_seconds(stream.last_key) is None
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
