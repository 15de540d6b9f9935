"""From logits to the next token: greedy or sampled, repeatable from a seed and the token's index alone."""

from __future__ import annotations

import torch
from torch import Tensor

from segcore.sampling import Logprobs, SamplingParams


def sample(logits_V: Tensor, params: SamplingParams, index: int) -> int:
    """The answer's token number `index`. Filters as usual: temperature, then top-k, then top-p (nucleus)."""
    if params.temperature == 0.0:
        return int(logits_V.argmax())
    values, tokens = logits_V.float().sort(descending=True, stable=True)
    if params.top_k:
        values, tokens = values[: params.top_k], tokens[: params.top_k]
    # In fp64, and the largest at zero, so that no temperature overflows.
    probabilities = ((values - values[0]).double() / params.temperature).softmax(dim=-1)
    # Keep the smallest set that reaches top_p: a token stays if those before it fall short.
    kept = probabilities.cumsum(dim=-1) - probabilities < params.top_p
    probabilities = probabilities[kept].cpu()
    generator = torch.Generator().manual_seed(_mix(params.seed, index))
    return int(tokens[int(torch.multinomial(probabilities, 1, generator=generator))])


def logprobs(logits_V: Tensor, token: int, likeliest: int) -> Logprobs:
    """Of `token` and of the `likeliest` ones."""
    logprobs_V = logits_V.double().log_softmax(dim=-1)
    values, tokens = logprobs_V.topk(min(likeliest, logits_V.shape[-1]))
    return Logprobs(token, float(logprobs_V[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


def _mix(seed: int, index: int) -> int:
    """A well-spread 63-bit seed from two numbers: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    mask = 2**64 - 1
    z = (seed + 0x9E3779B97F4A7C15 * (index + 1)) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1
