"""The scan of an index's codes on a GPU in one pass: no similarity is ever written to memory.

Shapes: P segments, C selectors, G query heads of a selector, W tokens of the query window, K rank, N tokens of a
segment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
except ImportError:  # it comes with torch where there is a GPU
    triton = None

_BLOCK_N = 128


def can_scan(codes: Tensor) -> bool:
    """Whether `scan` runs where these codes are."""
    return triton is not None and codes.is_cuda


def scan(q_PCGWK: Tensor, codes_PCKN: Tensor, levels_CGW: Tensor) -> Tensor:
    """Each token's best similarity over the window, less the query's level, summed over selectors and heads: [P, N],
    fp32."""
    segments, selectors, group, window, rank = q_PCGWK.shape
    tokens = codes_PCKN.shape[-1]
    out_PN = torch.empty((segments, tokens), dtype=torch.float32, device=codes_PCKN.device)
    q, codes, levels = q_PCGWK.contiguous(), codes_PCKN.contiguous(), levels_CGW.float().contiguous()
    # A tile of tl.dot has at least 16 rows and columns, and powers of two.
    sides = [max(16, 1 << (size - 1).bit_length()) for size in (window, rank)]
    grid = (segments, -(-tokens // _BLOCK_N))
    _scan[grid](q, codes, levels, out_PN, selectors, group, window, rank, tokens, *sides, _BLOCK_N)
    return out_PN


def _scan_tile(  # type: ignore[no-untyped-def]
    q,
    codes,
    levels,
    out,
    selectors,
    group,
    window,
    rank,
    tokens,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some tokens of one segment."""
    segment = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    w, k = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_K)
    best = tl.zeros([BLOCK_N], tl.float32)
    for c in range(selectors):
        selector = segment * selectors + c
        code_rows = codes + (selector * rank + k[:, None]) * tokens + n[None, :]
        code_tile = tl.load(code_rows, mask=(k[:, None] < rank) & (n[None, :] < tokens), other=0)
        for g in range(group):
            q_rows = q + ((selector * group + g) * window + w[:, None]) * rank + k[None, :]
            q_tile = tl.load(q_rows, mask=(w[:, None] < window) & (k[None, :] < rank), other=0.0)
            similarity = tl.dot(q_tile, code_tile.to(q_tile.dtype), input_precision="ieee")
            level = tl.load(levels + (c * group + g) * window + w, mask=w < window, other=float("inf"))
            best += tl.max(similarity - level[:, None], axis=0)
    tl.store(out + segment * tokens + n, best, mask=n < tokens)


_scan: Any = triton.jit(_scan_tile) if triton is not None else None
