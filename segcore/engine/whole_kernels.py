"""What a whole segment's pass does around attention on a GPU, two launches a layer, and what its close inserts, one.

All that changes from segment to segment is read on the device, so that a CUDA graph can hold the launches.

Shapes: L layers, H KV heads, G query heads per KV head, T tokens, N rows of prefix and segment, D head dimension,
C reader cells, R retrieved tokens, K watched cells, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

try:
    import triton
    from triton import language as tl
except ImportError:  # it comes with torch where there is a GPU
    triton = None

_BLOCK_T = 32
# What `Places.numbers` holds of a cell: of its window as it stands, start, base and position (`state.Window`); of its
# window after the close, where it starts, its sinks and its tail; its column of past KV and its number among the
# watched, or -1; and its place among the layer's heads, where those that see alike are adjacent.
NUMBERS = ("start", "base", "position", "new_start", "sinks", "tail", "column", "watched", "place")


@dataclass(frozen=True)
class Places:
    """Where a stream's windows are.

    offset_LH3: int64, of row 0 of keys, rotated keys and values, in numbers from `anchor`. numbers: int32, [9, L, H].
    cos_ND, sin_ND: the rotation's table.
    """

    anchor: Tensor
    offset_LH3: Tensor
    numbers: Tensor
    cos_ND: Tensor
    sin_ND: Tensor


@dataclass(frozen=True)
class Segment:
    """What a pass writes. rotated_HND, values_HND: what the layer at hand attends to, the segment behind its prefix,
    the prefix right-aligned; turned_THGD: its rotated queries; heads in the order of their places. kv_TC2D: keys and
    values of the readers. searched_KTD: keys of the watched cells."""

    rotated_HND: Tensor
    values_HND: Tensor
    turned_THGD: Tensor
    kv_TC2D: Tensor
    searched_KTD: Tensor


def enter(
    layer: int,
    q_HGTD: Tensor,
    k_HTD: Tensor,
    v_HTD: Tensor,
    places: Places,
    segment: Segment,
    *,
    prefix: int,
    first: bool,
) -> None:
    """Lay out what a layer attends to, and write what the close keeps of it: the tails, and in a stream's first segment
    the sinks, into the windows; readers' keys and values; watched cells' keys.

    prefix: rows of the layer's longest prefix. first: it is the stream's first segment.
    """
    heads, group, tokens, dim = q_HGTD.shape
    assert q_HGTD.stride(3) == k_HTD.stride(2) == v_HTD.stride(2) == 1
    rows = segment.rotated_HND.shape[1]
    numbers, offset_H3 = places.numbers[:, layer], places.offset_LH3[layer]
    if prefix:  # before its tail is written over
        _copy_prefix[(-(-prefix // _BLOCK_T), heads)](
            *(segment.rotated_HND, segment.values_HND, places.anchor, offset_H3, numbers),
            numbers.stride(0),
            rows - tokens,
            rows,
            dim // 2,
            _BLOCK_T,
        )
    _enter[(-(-tokens // _BLOCK_T), heads)](
        *(q_HGTD, k_HTD, v_HTD),
        *(segment.turned_THGD, segment.rotated_HND, segment.values_HND, segment.kv_TC2D, segment.searched_KTD),
        *(places.anchor, offset_H3, numbers, places.cos_ND, places.sin_ND),
        *q_HGTD.stride()[:3],
        *k_HTD.stride()[:2],
        *v_HTD.stride()[:2],
        numbers.stride(0),
        tokens,
        rows - tokens,
        segment.kv_TC2D.shape[1],
        heads,
        group,
        dim // 2,
        _BLOCK_T,
        first,
    )


def insert(positions_CR: Tensor, bulks: Tensor, segment_tokens: int, cells_C: Tensor, places: Places) -> None:
    """Write what was retrieved into the readers' windows, behind their sinks, read from wherever it is.

    positions_CR: or [1, R], for all alike. bulks: int64, [S], where every segment's keys and values lie, [T, C, 2, D].
    cells_C: int32, the readers' numbers among all cells.
    """
    count, dim = positions_CR.shape[1], places.cos_ND.shape[1]
    step = positions_CR.stride(0) if positions_CR.shape[0] > 1 else 0
    _insert[(count, len(cells_C))](
        positions_CR,
        bulks,
        cells_C,
        *(places.anchor, places.offset_LH3, places.numbers, places.cos_ND, places.sin_ND),
        step,
        places.numbers.stride(0),
        segment_tokens,
        len(cells_C),
        dim // 2,
        num_warps=1,
    )


def _enter_tile(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    turned,
    rotated,
    values,
    kv,
    searched,
    anchor,
    offset,
    numbers,
    cos,
    sin,
    q_h,
    q_g,
    q_t,
    k_h,
    k_t,
    v_h,
    v_t,
    number,
    tokens,
    before,
    columns,
    heads,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Some tokens of one KV head."""
    DIM: tl.constexpr = 2 * HALF
    h = tl.program_id(1)
    base = tl.load(numbers + number + h)
    position, place = tl.load(numbers + 2 * number + h), tl.load(numbers + 8 * number + h)
    own = (place * (before + tokens)).to(tl.int64) * DIM
    at_k, at_rotated, at_v = (
        anchor + tl.multiple_of(tl.load(offset + h * 3), 16),
        anchor + tl.multiple_of(tl.load(offset + h * 3 + 1), 16),
        anchor + tl.multiple_of(tl.load(offset + h * 3 + 2), 16),
    )
    d = tl.arange(0, HALF)[None, :]
    block = tl.program_id(0)
    t = (block * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    inside = t < tokens
    angle = (position + t) * DIM + d
    cos_low, cos_high = (
        tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32),
        tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32),
    )
    sin_low, sin_high = (
        tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32),
        tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32),
    )
    for g in tl.static_range(GROUP):
        at = h * q_h + g * q_g + t * q_t + d
        low, high = (
            tl.load(q + at, mask=inside, other=0.0).to(tl.float32),
            tl.load(q + at + HALF, mask=inside, other=0.0).to(tl.float32),
        )
        to = ((t * heads + place) * GROUP + g) * DIM + d
        tl.store(turned + to, low * cos_low - high * sin_low, mask=inside)
        tl.store(turned + to + HALF, high * cos_high + low * sin_high, mask=inside)
    at = h * k_h + t * k_t + d
    k_low, k_high = tl.load(k + at, mask=inside, other=0.0), tl.load(k + at + HALF, mask=inside, other=0.0)
    at = h * v_h + t * v_t + d
    v_low, v_high = tl.load(v + at, mask=inside, other=0.0), tl.load(v + at + HALF, mask=inside, other=0.0)
    low, high = k_low.to(tl.float32), k_high.to(tl.float32)
    to = own + (before + t) * DIM + d
    tl.store(rotated + to, low * cos_low - high * sin_low, mask=inside)
    tl.store(rotated + to + HALF, high * cos_high + low * sin_high, mask=inside)
    tl.store(values + to, v_low, mask=inside)
    tl.store(values + to + HALF, v_high, mask=inside)
    column, watched = tl.load(numbers + 6 * number + h), tl.load(numbers + 7 * number + h)
    if column >= 0:
        kv_at = (t * columns + column).to(tl.int64) * (2 * DIM) + d
        tl.store(kv + kv_at, k_low, mask=inside)
        tl.store(kv + kv_at + HALF, k_high, mask=inside)
        tl.store(kv + kv_at + DIM, v_low, mask=inside)
        tl.store(kv + kv_at + DIM + HALF, v_high, mask=inside)
    if watched >= 0:
        key_at = (watched * tokens + t) * DIM + d
        tl.store(searched + key_at, k_low, mask=inside)
        tl.store(searched + key_at + HALF, k_high, mask=inside)
    # What the next segment's prefix has of this one: its tail, and of the first one its sinks.
    tail = tl.load(numbers + 5 * number + h)
    if (block + 1) * BLOCK_T > tokens - tail:
        row, stands = base - tokens + t, position - tokens + t
        is_tail = inside & (t >= tokens - tail)
        _keep(at_k, at_rotated, at_v, cos, sin, row, stands, k_low, k_high, v_low, v_high, is_tail, HALF)
    if FIRST:
        sinks = tl.load(numbers + 4 * number + h)
        if block * BLOCK_T < sinks:
            first_row = tl.load(numbers + 3 * number + h) + t
            first = position - base + first_row
            _keep(at_k, at_rotated, at_v, cos, sin, first_row, first, k_low, k_high, v_low, v_high, t < sinks, HALF)


def _copy_prefix_tile(  # type: ignore[no-untyped-def]
    rotated, values, anchor, offset, numbers, number, before, rows, HALF: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Some rows of one KV head's prefix, from its end, to where the layer attends to it."""
    h = tl.program_id(1)
    start, base = tl.load(numbers + h), tl.load(numbers + number + h)
    own = (tl.load(numbers + 8 * number + h) * rows).to(tl.int64) * (2 * HALF)
    at_rotated = anchor + tl.multiple_of(tl.load(offset + h * 3 + 1), 16)
    at_v = anchor + tl.multiple_of(tl.load(offset + h * 3 + 2), 16)
    row = base - (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None] - 1
    inside = row >= start
    for half in tl.static_range(2):
        x = row * (2 * HALF) + half * HALF + tl.arange(0, HALF)[None, :]
        to = own + x + (before - base) * (2 * HALF)
        tl.store(rotated + to, tl.load(at_rotated + x, mask=inside, other=0.0), mask=inside)
        tl.store(values + to, tl.load(at_v + x, mask=inside, other=0.0), mask=inside)


def _keep_tile(  # type: ignore[no-untyped-def]
    at_k, at_rotated, at_v, cos, sin, row, position, k_low, k_high, v_low, v_high, keeps, HALF: tl.constexpr
):
    """Write rows of a window, their keys rotated to where they stand."""
    d = tl.arange(0, HALF)[None, :]
    to, angle = row * (2 * HALF) + d, position * (2 * HALF) + d
    cos_low = tl.load(cos + angle, mask=keeps, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + angle + HALF, mask=keeps, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + angle, mask=keeps, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + angle + HALF, mask=keeps, other=0.0).to(tl.float32)
    low, high = k_low.to(tl.float32), k_high.to(tl.float32)
    tl.store(at_k + to, k_low, mask=keeps)
    tl.store(at_k + to + HALF, k_high, mask=keeps)
    tl.store(at_rotated + to, low * cos_low - high * sin_low, mask=keeps)
    tl.store(at_rotated + to + HALF, high * cos_high + low * sin_high, mask=keeps)
    tl.store(at_v + to, v_low, mask=keeps)
    tl.store(at_v + to + HALF, v_high, mask=keeps)


def _insert_tile(  # type: ignore[no-untyped-def]
    positions,
    bulks,
    cells,
    anchor,
    offset,
    numbers,
    cos,
    sin,
    step,
    number,
    segment,
    columns,
    HALF: tl.constexpr,
):
    """One retrieved token of one reader."""
    r, c = tl.program_id(0), tl.program_id(1)
    at = tl.load(positions + c * step + r)
    cell = tl.load(cells + c)
    from_row = (tl.load(bulks + at // segment) - anchor.to(tl.int64)) // 2 + ((at % segment) * columns + c) * (4 * HALF)
    d = tl.arange(0, HALF)[None, :]
    source = anchor + tl.multiple_of(from_row, 16) + d
    k_low, k_high = tl.load(source), tl.load(source + HALF)
    v_low, v_high = tl.load(source + 2 * HALF), tl.load(source + 3 * HALF)
    row = tl.load(numbers + 3 * number + cell) + tl.load(numbers + 4 * number + cell) + r
    position = tl.load(numbers + 2 * number + cell) - tl.load(numbers + number + cell) + row
    at_k = anchor + tl.load(offset + cell * 3)
    at_rotated = anchor + tl.load(offset + cell * 3 + 1)
    at_v = anchor + tl.load(offset + cell * 3 + 2)
    _keep(at_k, at_rotated, at_v, cos, sin, row, position, k_low, k_high, v_low, v_high, d >= 0, HALF)


_enter: Any
_insert: Any
if triton is not None:
    _copy_prefix, _keep = triton.jit(_copy_prefix_tile), triton.jit(_keep_tile)
    _enter, _insert = triton.jit(_enter_tile), triton.jit(_insert_tile)
