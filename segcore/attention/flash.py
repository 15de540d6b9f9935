"""The flash-attn packages (FlashAttention-2, -3, -4; arXiv 2307.08691, 2407.08608), whichever are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from segcore.attention.base import Attention

# Where each version keeps its function. All align a causal mask to the bottom right.
_HOMES = {"flash4": "flash_attn.cute", "flash3": "flash_attn_interface", "flash2": "flash_attn"}


def flash_attentions() -> dict[str, Attention]:
    """Attention by the package's version, on a GPU in 16 bits only; see `base` for the mask."""
    found = {}
    for name, home in _HOMES.items():
        try:
            function = importlib.import_module(home).flash_attn_func
        except (ImportError, AttributeError):
            continue
        found[name] = _adapted(function)
    return found


def _adapted(function: Callable[..., Any]) -> Attention:
    def attention(q_HGTD: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q_HGTD.flatten(0, 1), k_HND, v_HND))
        out = function(q, k, v, softmax_scale=scale, causal=True)
        # Later versions return the softmax sums too.
        out_THD: Tensor = (out[0] if isinstance(out, tuple) else out)[0]
        return out_THD.transpose(0, 1).view(q_HGTD.shape)

    return attention
