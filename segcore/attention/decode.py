"""One token of each of many streams on a GPU: rotated, written and attended in three launches a layer.

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

_BLOCK_N = 64
# Programs that keep a GPU's processors busy, and the most parts that a stream's keys are cut into for that.
_PROGRAMS, _MOST_PARTS = 528, 32


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
    turned, out = torch.empty_like(q), torch.empty_like(q)
    part_out = torch.empty((streams, heads, parts, group, dim), dtype=torch.float32, device=q.device)
    part_sum = torch.empty((streams, heads, parts, group), dtype=torch.float32, device=q.device)
    at = (places.anchor, places.offset_BH3, places.start_BH, places.base_BH, places.position_BH, places.filled_B)
    cells, block_g = streams * heads, max(16, 1 << (group - 1).bit_length())
    _write[(cells,)](q, k, v, turned, *at, cos_ND, sin_ND, heads, group, dim // 2)
    _attend[(cells, parts)](turned, part_out, part_sum, *at, scale, heads, group, parts, dim, block_g, _BLOCK_N)
    _merge[(cells * group,)](part_out, part_sum, out, group, parts, dim, 1 << (parts - 1).bit_length())
    return out


def _write_tile(  # type: ignore[no-untyped-def]
    q, k, v, turned, anchor, offset, start, base, position, filled, cos, sin, heads, group, HALF: tl.constexpr
):
    """One stream's KV head: rotate its queries and key, and put key and value into their row."""
    cell = tl.program_id(0)
    done = tl.load(filled + cell // heads)
    row = tl.load(base + cell) + done
    angle = (tl.load(position + cell) + done) * (2 * HALF)
    low = tl.arange(0, HALF)
    high = low + HALF
    cos_low, cos_high = tl.load(cos + angle + low).to(tl.float32), tl.load(cos + angle + high).to(tl.float32)
    sin_low, sin_high = tl.load(sin + angle + low).to(tl.float32), tl.load(sin + angle + high).to(tl.float32)
    keys = anchor + tl.load(offset + cell * 3) + row * (2 * HALF)
    rotated = anchor + tl.load(offset + cell * 3 + 1) + row * (2 * HALF)
    values = anchor + tl.load(offset + cell * 3 + 2) + row * (2 * HALF)
    k_low, k_high = tl.load(k + cell * 2 * HALF + low), tl.load(k + cell * 2 * HALF + high)
    tl.store(keys + low, k_low)
    tl.store(keys + high, k_high)
    tl.store(values + low, tl.load(v + cell * 2 * HALF + low))
    tl.store(values + high, tl.load(v + cell * 2 * HALF + high))
    k_low, k_high = k_low.to(tl.float32), k_high.to(tl.float32)
    tl.store(rotated + low, k_low * cos_low - k_high * sin_low)
    tl.store(rotated + high, k_high * cos_high + k_low * sin_high)
    for g in range(group):
        at = (cell * group + g) * 2 * HALF
        q_low, q_high = tl.load(q + at + low).to(tl.float32), tl.load(q + at + high).to(tl.float32)
        tl.store(turned + at + low, q_low * cos_low - q_high * sin_low)
        tl.store(turned + at + high, q_high * cos_high + q_low * sin_high)


def _attend_tile(  # type: ignore[no-untyped-def]
    turned,
    part_out,
    part_sum,
    anchor,
    offset,
    start,
    base,
    position,
    filled,
    scale,
    heads,
    group,
    parts,
    DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One stream's KV head and part of its rows: the part's output, and the logarithm of its softmax sum, base 2."""
    cell, part = tl.program_id(0), tl.program_id(1)
    first = tl.load(start + cell)
    stop = tl.load(base + cell) + tl.load(filled + cell // heads) + 1
    size = tl.cdiv(tl.cdiv(stop - first, parts), BLOCK_N) * BLOCK_N
    at = first + part * size
    end = tl.minimum(at + size, stop)
    d, g, n = tl.arange(0, DIM), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_N)
    q = tl.load(turned + (cell * group + g[:, None]) * DIM + d[None, :], mask=g[:, None] < group, other=0.0)
    # Rows begin at multiples of the head dimension: wide loads are safe.
    keys = anchor + tl.multiple_of(tl.load(offset + cell * 3 + 1), 16)
    values = anchor + tl.multiple_of(tl.load(offset + cell * 3 + 2), 16)
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    out = tl.zeros([BLOCK_G, DIM], tl.float32)
    for begin in range(at, end, BLOCK_N):
        rows = begin + n
        inside = rows < end
        k = tl.load(keys + rows[None, :] * DIM + d[:, None], mask=inside[None, :], other=0.0)
        score = tl.dot(q, k) * (scale * 1.4426950408889634)
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(best - higher)
        v = tl.load(values + rows[:, None] * DIM + d[None, :], mask=inside[:, None], other=0.0)
        out = out * fade[:, None] + tl.dot(weight.to(v.dtype), v)
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
    _write, _attend, _merge = triton.jit(_write_tile), triton.jit(_attend_tile), triton.jit(_merge_tile)
