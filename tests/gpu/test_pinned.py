"""Pinned host memory: what it gives, takes back and gives again."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch

from segcore.pinned import SLAB_BYTES, PinnedMemory, pinned_memory, within_reach


def test_a_buffer_is_pinned_and_holds_what_is_copied():
    out = PinnedMemory().take((3, 1000), torch.bfloat16)
    given = torch.randn(3, 1000, device="cuda", dtype=torch.bfloat16)
    out.copy_(given, non_blocking=True)
    torch.cuda.synchronize()
    assert out.is_pinned()
    assert torch.equal(out, given.cpu())


def test_a_buffer_comes_back_when_no_view_of_it_is_left():
    memory = PinnedMemory()
    first = memory.take((1000,), torch.float32)
    address, view = first.data_ptr(), first[10:20].view(torch.int32)
    del first
    gc.collect()
    other = memory.take((1000,), torch.float32)
    assert other.data_ptr() != address, "a view of it is in use"
    del view
    gc.collect()
    assert memory.take((500, 2), torch.float32).data_ptr() == address


@pytest.mark.parametrize("size", [1, SLAB_BYTES // 3, SLAB_BYTES + 1])
def test_buffers_do_not_overlap(size):
    memory = PinnedMemory()
    taken = sorted((memory.take((size,), torch.uint8) for _ in range(5)), key=lambda t: t.data_ptr())
    for before, after in itertools.pairwise(taken):
        assert before.data_ptr() + size <= after.data_ptr()
    assert all(memory.holds(t) for t in taken)


def test_what_is_within_reach():
    assert within_reach(torch.zeros(1, device="cuda"))
    assert within_reach(pinned_memory().take((1,), torch.uint8))
    assert not within_reach(torch.zeros(1))
