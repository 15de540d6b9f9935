"""Blocks of random numbers for tests of past KV."""

from __future__ import annotations

import torch
from torch import Tensor

from segcore.pastkv.base import Block, PastLayout
from segcore.pastkv.journal import root_key
from segcore.pastkv.manager import PastKVManager
from segcore.pastkv.session import SessionPast

TOKENS = 40  # pages of 16: the last one is short
LAYOUT = PastLayout(segment_tokens=TOKENS, cells=2, selectors=1, head_dim=4, dtype=torch.bfloat16)
KV_BYTES = TOKENS * LAYOUT.block_bytes_per_token
INDEX_BYTES = TOKENS * LAYOUT.index_bytes_per_token
BOUNDARY_BYTES = 2 * 3 * 4 * 2 + 8
BLOCK_BYTES = KV_BYTES + INDEX_BYTES + BOUNDARY_BYTES
FILE_BYTES = 3000  # more than a block's file takes, less than two


def random(seed: int, *shape: int, dtype: torch.dtype = LAYOUT.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bulk(seed: int, dtype: torch.dtype = LAYOUT.dtype, tokens: int = TOKENS) -> Tensor:
    return random(seed, tokens, 2, 2, 4, dtype=dtype)


def index(seed: int, dtype: torch.dtype = LAYOUT.dtype) -> dict[str, Tensor]:
    return {"keys": random(seed + 1000, 1, TOKENS, 4, dtype=dtype)}


def boundary(seed: int, dtype: torch.dtype = LAYOUT.dtype) -> dict[str, Tensor]:
    return {
        "queries.0": random(seed + 2000, 2, 3, 4, dtype=dtype),
        "retrieved": torch.tensor([[seed]]),
        "none": torch.empty((1, 0)),
    }


def key(seed: int) -> str:
    return root_key("", str(seed))


def block(seed: int, dtype: torch.dtype = LAYOUT.dtype, tokens: int = TOKENS) -> Block:
    return Block(key(seed), bulk(seed, dtype, tokens), index(seed, dtype), boundary(seed, dtype))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, NaN and -0.0 too."""
    raw = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def tokens_of(seed: int) -> list[int]:
    return [seed, *range(TOKENS - 1)]


def close_segment(stream: SessionPast, seed: int, *, complete: bool = True) -> None:
    """A segment of tokens that `seed` determines, run in one pass."""
    stream.journal.extend(tokens_of(seed), [(stream.segments + 1) * TOKENS])
    stream.append(bulk(seed), index(seed))
    if complete:
        stream.complete(boundary(seed))


def stream_of(past: PastKVManager, *seeds: int, tenant: str = "") -> SessionPast:
    stream = past.open_stream(LAYOUT, tenant)
    for seed in seeds:
        close_segment(stream, seed)
    return stream


def everything(*seeds: int) -> Tensor:
    """Keys and values of a stream of these segments."""
    return torch.cat([bulk(seed) for seed in seeds])


def gathers(stream: SessionPast, *seeds: int) -> bool:
    """Whether a stream gives back all of these segments."""
    return same(stream.gather(torch.arange(TOKENS * len(seeds))), everything(*seeds))
