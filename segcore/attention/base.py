"""What every attention promises.

Shapes: H KV heads, G query heads per KV head, T queries, N keys, D head dimension. Query t sees keys 0..N-T+t
(a causal mask aligned to the bottom right), so the chunk's own keys are the last T.
"""

from collections.abc import Callable

from torch import Tensor

# Of queries [H, G, T, D], keys and values [H, N, D] and a scale: [H, G, T, D].
Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
