"""From logits to the next token: greedy or sampled, repeatable from a seed and the token's index alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from segcore.errors import InvalidRequest

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off; stop strings end the answer before them.

    A seed makes the answer a function of the stream: token i is drawn from (seed, i), so a broken answer can be taken
    up anywhere.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = [
            ("max_tokens", 1 <= self.max_tokens <= 1_000_000, "between 1 and 1,000,000"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "between 0 (greedy) and 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", 0 <= self.top_k <= 2**31, "0 (off) or a count of tokens"),
            ("seed", 0 <= self.seed <= MAX_SEED, "between 0 and 2^63 - 1"),
            ("stop", len(self.stop) <= 16, "at most 16 strings"),
            ("stop", all(0 < len(s) <= 256 for s in self.stop), "strings of 1 to 256 characters"),
        ]
        for name, good, want in checks:  # NaN fails every comparison, so it is refused too
            if not good:
                raise InvalidRequest(f"{name}={getattr(self, name)!r} must be {want}", field=name)


def sample(logits_V: Tensor, params: SamplingParams, index: int) -> int:
    """The answer's token number `index`. Filters as usual: temperature, then top-k, then top-p (nucleus)."""
    if params.temperature == 0.0:
        return int(logits_V.argmax())
    values, tokens = (logits_V.float() / params.temperature).sort(descending=True, stable=True)
    if params.top_k:
        values, tokens = values[: params.top_k], tokens[: params.top_k]
    probabilities = values.softmax(dim=-1)
    # Keep the smallest set that reaches top_p: a token stays if those before it fall short.
    kept = probabilities.cumsum(dim=-1) - probabilities < params.top_p
    probabilities = probabilities[kept].cpu()
    generator = torch.Generator().manual_seed(_mix(params.seed, index))
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator).item()])


def _mix(seed: int, index: int) -> int:
    """A well-spread 63-bit seed from two numbers: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    mask = 2**64 - 1
    z = (seed + 0x9E3779B97F4A7C15 * (index + 1)) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1
