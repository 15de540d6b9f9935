"""torch's scaled_dot_product_attention, everywhere available."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def sdpa_attention(q_HGTD: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
    """Softmax attention, [H, G, T, D]; see the package's docstring for the mask."""
    heads, group, tokens, dim = q_HGTD.shape
    keys = k_HND.shape[1]
    if tokens == 1:
        # One query per head sees every key: the group's queries become the query axis, and no mask is needed.
        folded = scaled_dot_product_attention(q_HGTD.view(1, heads, group, dim), k_HND[None], v_HND[None], scale=scale)
        return folded.view(heads, group, 1, dim)
    aligned = tokens == keys  # torch aligns its causal mask to the top left
    out = scaled_dot_product_attention(
        q_HGTD.reshape(1, heads * group, tokens, dim),
        k_HND[None],
        v_HND[None],
        attn_mask=None if aligned else _causal_mask(tokens, keys, q_HGTD.dtype, q_HGTD.device),
        is_causal=aligned,
        scale=scale,
        enable_gqa=group > 1,
    )
    return out.view(heads, group, tokens, dim)


@functools.lru_cache(maxsize=4)  # the layers of one forward pass share a mask
def _causal_mask(tokens: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[T, N], to be added to the scores: 0 where a query may look, else minus infinity."""
    with torch.inference_mode(False):  # an inference tensor couldn't serve a later training pass
        return torch.full((tokens, keys), -torch.inf, dtype=dtype, device=device).triu(keys - tokens + 1)


def forget_masks() -> None:
    """Let go of the masks of the latest passes; the next ones make their own."""
    _causal_mask.cache_clear()
