"""Attention of a chunk's queries over [prefix | segment], behind one signature.

Shapes: H KV heads, G query heads per KV head, T queries, N keys, D head dimension. Query t sees keys 0..N-T+t
(a causal mask aligned to the bottom right), so the chunk's own keys are the last T.
"""

from collections.abc import Callable

from torch import Tensor

from segcore.attention.reference import reference_attention
from segcore.attention.sdpa import sdpa_attention

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]

ATTENTION: dict[str, Attention] = {"reference": reference_attention, "sdpa": sdpa_attention}

__all__ = ["ATTENTION", "Attention"]
