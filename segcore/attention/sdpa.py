"""torch's scaled_dot_product_attention, everywhere available."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def sdpa_attention(q_HGTD: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
    """Softmax attention, [H, G, T, D]; see `base` for the mask."""
    heads, group, tokens, dim = q_HGTD.shape
    prefix = k_HND.shape[1] - tokens
    if tokens == 1:
        # One query per head sees every key: the group's queries become the query axis, and no mask is needed.
        folded = scaled_dot_product_attention(q_HGTD.view(1, heads, group, dim), k_HND[None], v_HND[None], scale=scale)
        return folded.view(heads, group, 1, dim)
    q, k, v = q_HGTD.reshape(1, heads * group, tokens, dim), k_HND[None], v_HND[None]
    if prefix and q.is_cpu:
        out = cast(Tensor, cast(Any, _PrefixAndSegment).apply(q, k, v, scale))
    else:
        # torch aligns its own causal mask to the top left.
        mask = causal_lower_right(tokens, prefix + tokens) if prefix else None
        out = scaled_dot_product_attention(q, k, v, mask, is_causal=not prefix, scale=scale, enable_gqa=group > 1)
    return out.view(heads, group, tokens, dim)


class _PrefixAndSegment(torch.autograd.Function):
    """Attention to a prefix that all queries see, and causal attention to the rest, merged by their softmax sums.

    On CPUs torch has no causal mask that is aligned to the bottom right but one written out, whose future half it
    computes all the same: twice the time at 2,048 tokens. Exact, as in FlashDecoding and ring attention (arXiv
    2310.01889, section 3): each part's backward pass takes the output and the sums of the whole.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        prefix = k.shape[2] - q.shape[2]
        out, sums = _forward(q, k[:, :, :prefix], v[:, :, :prefix], 0.0, False, scale=scale)
        own, own_sums = _forward(q, k[:, :, prefix:], v[:, :, prefix:], 0.0, True, scale=scale)
        out = torch.lerp(out, own, torch.sigmoid(own_sums - sums)[..., None].to(out.dtype))
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, out, torch.logaddexp(sums, own_sums))
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        prefix = k.shape[2] - q.shape[2]
        parts = ((slice(0, prefix), False), (slice(prefix, None), True))
        (d_q, *d_kv), (own_d_q, *own_d_kv) = (
            _backward(grad, q, k[:, :, rows], v[:, :, rows], out, sums, 0.0, causal, scale=ctx.scale)
            for rows, causal in parts
        )
        d_k, d_v = (torch.cat([of_prefix, own], dim=2) for of_prefix, own in zip(d_kv, own_d_kv, strict=True))
        return d_q + own_d_q, d_k, d_v, None
