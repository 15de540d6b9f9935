"""How the next token is drawn from the logits: parameters only, so that clients need no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from segcore.errors import InvalidRequest

FinishReason = Literal["stop", "length", "aborted"]

MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Logprobs:
    """Natural log-probabilities of a token and of the likeliest ones, by the model, before temperature and filters."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off; stop strings end the answer before them.

    logprobs: with each token, its log-probability and those of so many likeliest ones; None: without.

    A seed makes the answer a function of the stream: token i is drawn from (seed, i), so a broken answer can be taken
    up anywhere.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed"):
            if not isinstance(getattr(self, name), int):
                raise InvalidRequest(f"{name}={getattr(self, name)!r} must be a whole number", field=name)
        if not isinstance(self.logprobs, int | None):
            raise InvalidRequest(f"logprobs={self.logprobs!r} must be a whole number", field="logprobs")
        if not isinstance(self.stop, tuple):
            raise InvalidRequest(f"stop={self.stop!r} must be a tuple of strings", field="stop")
        checks = [
            ("max_tokens", 1 <= self.max_tokens <= 1_000_000, "between 1 and 1,000,000"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "between 0 (greedy) and 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", 0 <= self.top_k <= 2**31, "0 (off) or a count of tokens"),
            ("seed", 0 <= self.seed <= MAX_SEED, "between 0 and 2^63 - 1"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"at most {MAX_LOGPROBS} tokens"),
            ("stop", len(self.stop) <= 16, "at most 16 strings"),
            ("stop", all(0 < len(s) <= 256 for s in self.stop), "strings of 1 to 256 characters"),
        ]
        for name, good, want in checks:  # NaN fails every comparison, so it is refused too
            if not good:
                raise InvalidRequest(f"{name}={getattr(self, name)!r} must be {want}", field=name)
