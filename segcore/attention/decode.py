"""One token of each of many streams on a GPU: rotated, written and attended in two launches a layer.

Keys are read in parts, whose softmax sums are merged, as in Flash-Decoding (Dao et al. 2023). All that changes from
token to token is read on the device, so that a CUDA graph can hold the launches; windows stay where they are.

Shapes: B streams, H KV heads, G query heads per KV head, D head dimension, N rows of a window, P parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from segcore.model import ModelSpec

try:
    import triton
    from triton import language as tl
except ImportError:  # it comes with torch where there is a GPU
    triton = None

# By measurement on an H200, of 96 settings. _PROGRAMS: what keeps a GPU's processors busy; _MOST_PARTS: that a stream's
# keys are cut into for it.
_BLOCK_N, _WARPS, _STAGES = 64, 2, 3
_PROGRAMS, _MOST_PARTS = 132, 32


@dataclass(frozen=True)
class Places:
    """Where a layer's windows are, for each stream and KV head.

    offset_BH3: int64, of row 0 of keys, rotated keys and values, in numbers from `anchor`. start_BH, base_BH,
    position_BH: int32, as in `state.Window`. filled_B: int32, tokens of each open segment.
    """

    anchor: Tensor
    offset_BH3: Tensor
    start_BH: Tensor
    base_BH: Tensor
    position_BH: Tensor
    filled_B: Tensor


def can_decode(spec: ModelSpec) -> bool:
    """Whether `decode_attention` runs such a model where it is."""
    powers_of_two = spec.head_dim & (spec.head_dim - 1) == 0 and 16 <= spec.head_dim <= 256
    return triton is not None and spec.device.type == "cuda" and spec.dtype.itemsize == 2 and powers_of_two


def decode_attention(
    q_BHGD: Tensor, k_BHD: Tensor, v_BHD: Tensor, places: Places, cos_ND: Tensor, sin_ND: Tensor, scale: float
) -> Tensor:
    """Write each stream's key, rotated key and value behind its segment, and attend from there; [B, H, G, D].

    Queries and keys aren't rotated yet. The rotation is the usual one, of halves, in fp32.
    """
    streams, heads, group, dim = q_BHGD.shape
    parts = min(_MOST_PARTS, -(-_PROGRAMS // (streams * heads)))
    q, k, v = q_BHGD.contiguous(), k_BHD.contiguous(), v_BHD.contiguous()
    out = torch.empty_like(q)
    part_out = torch.empty((streams, heads, parts, group, dim), dtype=torch.float32, device=q.device)
    part_sum = torch.empty((streams, heads, parts, group), dtype=torch.float32, device=q.device)
    at = (places.anchor, places.offset_BH3, places.start_BH, places.base_BH, places.position_BH, places.filled_B)
    cells, block_g = streams * heads, max(16, 1 << (group - 1).bit_length())
    numbers = cos_ND, sin_ND, scale, heads, group, parts, dim // 2, block_g, _BLOCK_N
    _attend[(cells, parts)](q, k, v, part_out, part_sum, *at, *numbers, num_warps=_WARPS, num_stages=_STAGES)
    _merge[(cells * group,)](part_out, part_sum, out, group, parts, dim, 1 << (parts - 1).bit_length(), num_warps=1)
    return out


def _attend_tile(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    part_out,
    part_sum,
    anchor,
    offset,
    start,
    base,
    position,
    filled,
    cos,
    sin,
    scale,
    heads,
    group,
    parts,
    HALF: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One stream's KV head and part of its rows: the part's output, and the logarithm of its softmax sum, base 2.

    Whose part the new row is puts key and value there first.
    """
    DIM: tl.constexpr = 2 * HALF
    cell, part = tl.program_id(0), tl.program_id(1)
    done = tl.load(filled + cell // heads)
    first, new = tl.load(start + cell), tl.load(base + cell) + done
    stop = new + 1
    size = tl.cdiv(tl.cdiv(stop - first, parts), BLOCK_N) * BLOCK_N
    at = first + part * size
    end = tl.minimum(at + size, stop)
    d, g, n = tl.arange(0, DIM), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_N)
    # Rows begin at multiples of the head dimension: wide loads are safe.
    keys = anchor + tl.multiple_of(tl.load(offset + cell * 3 + 1), 16)
    values = anchor + tl.multiple_of(tl.load(offset + cell * 3 + 2), 16)
    # The rotation turns each half with the other one.
    angle, other = (tl.load(position + cell) + done) * DIM, tl.where(d < HALF, d + HALF, d - HALF)
    cosine = tl.load(cos + angle + d).to(tl.float32)
    sine = tl.load(sin + angle + d).to(tl.float32) * tl.where(d < HALF, -1.0, 1.0)
    if (at <= new) & (new < end):
        plain, crossed = tl.load(k + cell * DIM + d), tl.load(k + cell * DIM + other).to(tl.float32)
        tl.store(anchor + tl.load(offset + cell * 3) + new * DIM + d, plain)
        tl.store(keys + new * DIM + d, plain.to(tl.float32) * cosine + crossed * sine)
        tl.store(values + new * DIM + d, tl.load(v + cell * DIM + d))
    tl.debug_barrier()  # other threads of this program read them
    queries, some_g = q + (cell * group + g[:, None]) * DIM, g[:, None] < group
    plain = tl.load(queries + d[None, :], mask=some_g, other=0.0)
    crossed = tl.load(queries + other[None, :], mask=some_g, other=0.0).to(tl.float32)
    turned = (plain.to(tl.float32) * cosine[None, :] + crossed * sine[None, :]).to(plain.dtype)
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    out = tl.zeros([BLOCK_G, DIM], tl.float32)
    for begin in range(at, end, BLOCK_N):
        rows = begin + n
        inside = rows < end
        key = tl.load(keys + rows[None, :] * DIM + d[:, None], mask=inside[None, :], other=0.0)
        score = tl.dot(turned, key) * (scale * 1.4426950408889634)
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(best - higher)
        value = tl.load(values + rows[:, None] * DIM + d[None, :], mask=inside[:, None], other=0.0)
        out = out * fade[:, None] + tl.dot(weight.to(value.dtype), value)
        total = total * fade + tl.sum(weight, axis=1)
        best = higher
    # A part without rows weighs nothing.
    some = total > 0
    place = (cell * parts + part) * group + g
    tl.store(
        part_sum + place, tl.where(some, best + tl.log2(tl.where(some, total, 1.0)), float("-inf")), mask=g < group
    )
    out = out / tl.where(some, total, 1.0)[:, None]
    tl.store(part_out + place[:, None] * DIM + d[None, :], out, mask=g[:, None] < group)


def _merge_tile(  # type: ignore[no-untyped-def]
    part_out, part_sum, out, group, parts, DIM: tl.constexpr, BLOCK_P: tl.constexpr
):
    """One query head of one stream."""
    row = tl.program_id(0)
    p, d = tl.arange(0, BLOCK_P), tl.arange(0, DIM)
    place = ((row // group) * parts + p) * group + row % group
    sums = tl.load(part_sum + place, mask=p < parts, other=float("-inf"))
    weight = tl.exp2(sums - tl.max(sums, axis=0))
    pieces = tl.load(part_out + place[:, None] * DIM + d[None, :], mask=p[:, None] < parts, other=0.0)
    merged = tl.sum(pieces * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(out + row * DIM + d, merged)


if triton is not None:
    _attend, _merge = triton.jit(_attend_tile), triton.jit(_merge_tile)
