"""The slow oracle: attention as it is written down, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_attention(q_HGTD: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
    """Softmax attention, [H, G, T, D]; see `base` for the mask."""
    tokens, keys = q_HGTD.shape[2], k_HND.shape[1]
    scores_HGTN = q_HGTD.double() @ k_HND.double().transpose(-1, -2)[:, None] * scale
    future_TN = torch.ones(tokens, keys, dtype=torch.bool, device=q_HGTD.device).triu(keys - tokens + 1)
    weights = scores_HGTN.masked_fill(future_TN, -torch.inf).softmax(dim=-1)
    return (weights @ v_HND.double()[:, None]).to(q_HGTD.dtype)
