"""The scan of an index in one pass: torch's own products, levels and maxima, on fresh inputs of every shape."""

from __future__ import annotations

import pytest
import torch

from segcore.retrieval.scan import can_scan, scan


@pytest.mark.parametrize("window", [1, 7, 64])
@pytest.mark.parametrize(("rank", "tokens"), [(24, 1024), (48, 4096), (3, 100), (16, 1)])
@pytest.mark.parametrize(("selectors", "group"), [(1, 3), (2, 1), (3, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_scan_is_the_sum_of_the_best_similarities(window, rank, tokens, selectors, group, dtype):
    q = torch.randn(5, selectors, group, window, rank, device="cuda", dtype=dtype)
    codes = torch.randint(-127, 128, (5, selectors, rank, tokens), device="cuda", dtype=torch.int8)
    levels = 100 * torch.randn(selectors, group, window, device="cuda")
    assert can_scan(codes)
    similarity = (q.double().flatten(2, 3) @ codes.double()).unflatten(2, (group, window))
    want = (similarity - levels[..., None]).amax(dim=3).sum(dim=(1, 2))
    error = (scan(q, codes, levels).double() - want).abs().max() / want.abs().max()
    assert error < 1e-5
