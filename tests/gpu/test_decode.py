"""Attention of one token of many streams, against the fp64 oracle, from windows that lie anywhere."""

from __future__ import annotations

import pytest
import torch

from segcore.attention.decode import Places, decode_attention
from segcore.attention.reference import reference_attention

LENGTHS = [1, 2, 63, 64, 65, 700, 4869]


def places_of(windows, filled):
    """windows: per stream, per head: (keys, rotated, values, start, base, position), row tensors [N, D]."""
    anchor = torch.empty(16, dtype=torch.bfloat16, device="cuda")

    def pack(pick, kind):
        return torch.tensor([[pick(w) for w in heads] for heads in windows], dtype=kind, device="cuda")

    offset = pack(lambda w: [(x.data_ptr() - anchor.data_ptr()) // 2 for x in w[:3]], torch.int64)
    start, base, position = (pack(lambda w, i=i: w[i], torch.int32) for i in (3, 4, 5))
    return Places(anchor, offset, start, base, position, torch.tensor(filled, dtype=torch.int32, device="cuda"))


@pytest.mark.parametrize(("heads", "group", "dim"), [(3, 3, 64), (32, 1, 128), (8, 4, 128), (1, 20, 16), (2, 1, 256)])
def test_each_stream_attends_to_its_own_rows(heads, group, dim):
    torch.manual_seed(heads)
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    cos, sin = torch.randn(6000, dim, **kind), torch.randn(6000, dim, **kind)
    q, k, v = (torch.randn(len(LENGTHS), heads, n, dim, **kind) for n in (group, 1, 1))
    windows, filled = [], []
    for length in LENGTHS:
        filled.append(length // 2)
        windows.append([])
        for _ in range(heads):
            start, rows = 5, 5 + length + 3
            kv = [torch.randn(rows, dim, **kind) for _ in range(3)]
            windows[-1].append((*kv, start, start + length - 1 - filled[-1], 17))
    out = decode_attention(q, k[:, :, 0], v[:, :, 0], places_of(windows, filled), cos, sin, 0.1)
    half = dim // 2

    def turn(x, position):
        swapped = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * cos[position].to(x) + swapped * sin[position].to(x)

    for b, length in enumerate(LENGTHS):
        for h in range(heads):
            keys, rotated, values, start, base, position = windows[b][h]
            row = base + filled[b]
            assert torch.equal(keys[row], k[b, h, 0])
            assert torch.equal(values[row], v[b, h, 0])
            turned = turn(k[b, h, 0].float(), position + filled[b])
            torch.testing.assert_close(rotated[row].float(), turned, atol=1e-6, rtol=0.01)
            seen = slice(start, row + 1)
            want = reference_attention(
                turn(q[b, h].double(), position + filled[b])[None, :, None],
                rotated[None, seen].double(),
                values[None, seen].double(),
                0.1,
            )
            error = (out[b, h].double() - want[0, :, 0]).norm() / want.norm()
            assert error < 0.01, (length, h, error)
