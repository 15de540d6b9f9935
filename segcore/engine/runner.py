"""F, the one operator: (logits, state') = F(tokens of a chunk, state). Training, prefill and decode call this.

Shapes: T tokens, H KV heads, G query heads per KV head, N rows, D head dimension, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from segcore.attention import ATTENTION
from segcore.config import Cell, SegmentConfig
from segcore.model import CausalLM
from segcore.pastkv.manager import SessionPast
from segcore.policies import make_policy
from segcore.segments import is_refresh_point
from segcore.state import State, Window


class Runner:
    """A model under a policy."""

    def __init__(self, model: CausalLM, config: SegmentConfig) -> None:
        self.model, self.config = model, config
        self.policy = make_policy(config, model.spec, model.rope)
        self._attention = ATTENTION["sdpa"]
        self._selector = {cell: i for i, cell in enumerate(self.policy.watched)}

    def begin(self) -> State:
        """The state before a stream's first token."""
        spec, state = self.model.spec, self.policy.begin()
        no_queries = torch.empty((spec.queries_per_kv_head, 0, spec.head_dim), dtype=spec.dtype, device=spec.device)
        state.queries = [no_queries] * len(self._selector)
        return state

    def advance(self, tokens_T: Tensor, state: State, past: SessionPast, *, all_logits: bool = False) -> Tensor:
        """F. Updates `state` and `past`; returns the logits of the last token, [1, V], or of all, [T, V].

        The chunk lies inside one segment and crosses no refresh point (`segments.tokens_to_next_cut`). A segment that
        it fills is closed, and a refresh point that it reaches is taken, before this returns.
        """
        assert 0 < len(tokens_T) <= self.config.segment_tokens - state.filled

        def attend(layer: int, q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float) -> Tensor:
            self._watch(state, layer, q_HGTD)
            windows = state.layers[layer]
            if len(windows) == 1:
                return self._attend(windows[0], state.filled, q_HGTD, k_HTD, v_HTD, scale)
            out = torch.empty_like(q_HGTD)
            for w in windows:
                heads = list(w.heads)
                out[heads] = self._attend(w, state.filled, q_HGTD[heads], k_HTD[heads], v_HTD[heads], scale)
            return out

        logits = self.model(tokens_T.to(self.model.spec.device), attend, all_logits=all_logits)
        state.length += len(tokens_T)
        state.filled += len(tokens_T)
        if state.filled == self.config.segment_tokens:
            self.policy.close(state, past)
        elif is_refresh_point(state.filled, self.config):
            self.policy.refresh(state, past)
        return logits

    def mark(self, state: State, past: SessionPast) -> None:
        """An end of turn at the stream's end: a refresh point that doesn't close the segment (design, section 6)."""
        self.policy.refresh(state, past)

    def _attend(
        self, window: Window, filled: int, q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float
    ) -> Tensor:
        """Append the chunk to the window, then let its queries see the prefix and the segment so far."""
        row = window.base + filled
        stop = row + k_HTD.shape[1]
        rotated_q, rotated_k = self.model.rope(q_HGTD.flatten(0, 1), k_HTD, row)
        window.write(row, k_HTD, rotated_k, v_HTD)
        seen = slice(window.start, stop)
        return self._attention(rotated_q.view_as(q_HGTD), window.rotated_HND[:, seen], window.v_HND[:, seen], scale)

    def _watch(self, state: State, layer: int, q_HGTD: Tensor) -> None:
        """Keep the selectors' latest unrotated queries."""
        for head in range(q_HGTD.shape[0]):
            i = self._selector.get(Cell(layer, head))
            if i is not None:
                latest = torch.cat([state.queries[i], q_HGTD[head]], dim=1)
                state.queries[i] = latest[:, -self.config.query_window_tokens :].clone()
