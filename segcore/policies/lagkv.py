"""`lagkv`: of each lag of the past, the tokens that differ most from the next lag are kept (LagKV, arXiv 2504.04704).

After its sinks a stream is cut into lags of L tokens. Once lag p + 1 is complete, each KV head keeps the best
floor(r L) tokens of lag p, by `score_lag`; the last full lag and what comes after it are kept whole. No query is asked,
so prefill, decode and training decide alike. Original positions; keys are scored as cached, rotated. LRSA (arXiv
2506.11498) trains with the same rule, the gradient passing through kept keys and values and not through the choice.

Where ours differs: lags are compressed when a segment closes, every lag that can be, so a token sees the past as it
stood before its segment (the released code compresses after any pass that made two lags, wherever passes end); scores
are in fp32 or better, with EPSILON added to the range; ties go to the earlier token; kept tokens stay in stream order.

Shapes: P lags, L tokens of a lag, H KV heads, N rows, K kept tokens of a lag, D head dimension.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from segcore.config import LagKVConfig
from segcore.model import ModelSpec, Rope
from segcore.pastkv.session import SessionPast
from segcore.policies.base import Policy
from segcore.state import State, Window

# Added to a channel's range. Where the next lag is constant in a channel, a token that has the constant too is at 0,
# and any other is far from everything, hence kept; elsewhere it is below the noise of a key or value.
EPSILON = 1e-6


def score_lag(k_LD: Tensor, v_LD: Tensor, next_k_LD: Tensor, next_v_LD: Tensor) -> Tensor:
    """How much a head's tokens differ from the lag after theirs: scores [..., L]; any leading dimensions.

    For keys and values alike: each channel is normalised by its least and greatest value in the next lag, a token's
    spread is the (unbiased) standard deviation over its channels, and a softmax over the lag makes the spreads of keys
    and values comparable; the score is their sum.
    """
    return _share_of_spread(k_LD, next_k_LD) + _share_of_spread(v_LD, next_v_LD)


def _share_of_spread(lag_LD: Tensor, next_LD: Tensor) -> Tensor:
    wide = torch.promote_types(lag_LD.dtype, torch.float32)
    lag_LD, next_LD = lag_LD.to(wide), next_LD.to(wide)
    low, high = next_LD.amin(dim=-2, keepdim=True), next_LD.amax(dim=-2, keepdim=True)
    return ((lag_LD - low) / (high - low + EPSILON)).std(dim=-1).softmax(dim=-1)


def best_of_lag(scores_L: Tensor, count: int) -> Tensor:
    """The `count` best tokens of a lag, ascending, [..., K]; ties to the earlier."""
    return torch.sort(scores_L.detach(), dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


class LagKVPolicy(Policy[LagKVConfig]):
    original_positions = True
    bounded = False

    def __init__(self, config: LagKVConfig, spec: ModelSpec, rope: Rope) -> None:
        super().__init__(config, spec, rope)
        self.kept_tokens = math.floor(config.keep * config.lag_tokens)

    def windows(self, layer: int) -> list[Window]:
        return [self._window(range(self.spec.kv_heads))]

    def close(self, state: State, past: SessionPast) -> None:
        done = self._compressed(state.closed)
        due = self._compressed(state.length) - done
        for (window,) in state.layers:
            stop = window.base + state.filled
            # Rows stand in stream order: sinks, what is left of compressed lags, and from `first` on everything.
            first = min(window.start + self.config.sink_tokens + done * self.kept_tokens, stop)
            window.keep(self._rows(window, first, stop, due, past), position=state.length)
        state.filled = 0

    def _compressed(self, tokens: int) -> int:
        """How many lags are compressed in a prefix of so many tokens: all full ones but the last."""
        return max((tokens - self.config.sink_tokens) // self.config.lag_tokens - 1, 0)

    def _rows(self, window: Window, first: int, stop: int, lags: int, past: SessionPast) -> Tensor:
        """The rows that stay, of [window.start, stop), when the `lags` lags from row `first` on are compressed: [H, N].

        A lag's successor follows it, whole.
        """
        size, heads, device = self.config.lag_tokens, len(window.heads), window.k_HND.device
        end = first + lags * size
        before, after = torch.arange(window.start, first, device=device), torch.arange(end, stop, device=device)
        kept_HN = torch.empty((heads, 0), dtype=torch.long, device=device)
        if lags:
            lag_rows = slice(first, end + size)
            k, v = window.rotated_HND[:, lag_rows], window.v_HND[:, lag_rows]
            k_HPLD, v_HPLD = k.unflatten(1, (-1, size)), v.unflatten(1, (-1, size))
            scored = partial(score_lag, k_HPLD[:, :-1], v_HPLD[:, :-1], k_HPLD[:, 1:], v_HPLD[:, 1:])
            best_HPK = past.decide(lambda: best_of_lag(scored(), self.kept_tokens)).to(device)
            starts_P1 = torch.arange(first, end, size, device=device)[:, None]
            kept_HN = (starts_P1 + best_HPK).flatten(1)
        return torch.cat([before.expand(heads, -1), kept_HN, after.expand(heads, -1)], dim=1)
