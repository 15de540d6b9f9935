"""F, the one operator: (logits, state') = F(tokens of a chunk, state). Training, prefill and decode call this.

Shapes: B sequences, T tokens, H KV heads, G query heads per KV head, N rows, D head dimension, V vocabulary,
C hidden dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from segcore.attention.choice import make_attention
from segcore.config import Cell, SegmentConfig
from segcore.engine.graphs import DecodeGraphs
from segcore.engine.whole import WholeSegments
from segcore.model import CausalLM
from segcore.pastkv.session import SessionPast
from segcore.policies import make_policy
from segcore.segments import is_refresh_point
from segcore.state import State, Window


class Runner:
    """A model under a policy. attention: the backend's name; see `make_attention`, whose errors this raises."""

    def __init__(self, model: CausalLM, config: SegmentConfig, attention: str = "auto") -> None:
        self.model, self.config = model, config
        self.policy = make_policy(config, model.spec, model.rope, model.query_maps)
        keys = self.policy.windows(0)[0].base + config.segment_tokens
        self.attention = make_attention(attention, model.spec, config.segment_tokens, keys)
        self._watched = {cell: i for i, cell in enumerate(self.policy.watched)}
        self._rows: dict[tuple[int, ...], Tensor] = {}
        pool = torch.cuda.graph_pool_handle() if model.spec.device.type == "cuda" else None
        self._decode = DecodeGraphs(model, self.policy, pool)
        self._wholes = WholeSegments(model, self.policy, self.attention, pool)

    def begin(self) -> State:
        """The state before a stream's first token."""
        return self.policy.begin()

    def advance(self, tokens_T: Tensor, state: State, past: SessionPast, *, all_logits: bool = False) -> Tensor:
        """F. Updates `state` and `past`; returns the logits of the last token, [1, V], or of all, [T, V].

        The chunk lies inside one segment and crosses no refresh point (`segments.tokens_to_next_cut`). A segment that
        it fills is closed, and a refresh point that it reaches is taken, before this returns.
        """
        logits = self.forward(tokens_T[None], [state], [past], all_logits=all_logits)[0]
        self.arrive(state, past, len(tokens_T), logits[-1])
        return logits

    def forward(
        self,
        tokens_BT: Tensor,
        states: Sequence[State],
        pasts: Sequence[SessionPast],
        *,
        width: int = 1,
        all_logits: bool = False,
    ) -> Tensor:
        """The pass itself, for several streams, each as if alone; [B, 1, V] or [B, T, V]. `arrive` must follow.

        width: the batch is padded to this many sequences. With one width for all passes of a kind, a stream's values
        don't depend on its company, to the last bit: matrix products of one shape treat their rows alike.
        """
        if tokens_BT.shape[1] == 1 and self._decode.usable():
            self.begin_pass(tokens_BT, states, pasts)
            return self._decode.run(tokens_BT, states, width)
        if len(states) == 1 and not all_logits and self._wholes.fits(states[0], tokens_BT.shape[1]):
            self.begin_pass(tokens_BT, states, pasts)
            return self._wholes.run(tokens_BT[0], states[0], pasts[0])[None]
        return self.model.head(self.hidden(tokens_BT, states, pasts, width=width), all_logits=all_logits)[: len(states)]

    def hidden(
        self, tokens_BT: Tensor, states: Sequence[State], pasts: Sequence[SessionPast], *, width: int = 1
    ) -> Tensor:
        """What `forward` makes logits of, [width or B, T, C]."""
        self.begin_pass(tokens_BT, states, pasts)
        return self.pass_over(tokens_BT, states, width=width)

    def pass_over(self, tokens_BT: Tensor, states: Sequence[State], *, width: int = 1) -> Tensor:
        """As `hidden`, of a pass that was written down."""
        for state in states:
            state.reserve(tokens_BT.shape[1], self.config.segment_tokens)
        padded = torch.nn.functional.pad(tokens_BT, (0, 0, 0, max(width - len(states), 0)))
        attends = [_Pass(self, state) for state in states]
        hidden_BTC = self.model.hidden(padded.to(self.model.spec.device), attends)
        for attend in attends:
            attend.end()
        return hidden_BTC

    def arrive(self, state: State, past: SessionPast, tokens: int, logits_V: Tensor | None) -> None:
        """A pass over `tokens` is done: take the close or the refresh point that it reached.

        logits_V: of its last token; without them a closed segment's block isn't completed: no other stream uses it.
        Raises PastKVError; then the state is of no use, and the journal says how to make it again.
        """
        state.length += tokens
        state.filled += tokens
        if state.filled == self.config.segment_tokens:
            self.policy.close(state, past)
            state.moved()
            if self.policy.layout is not None and logits_V is not None:
                past.complete(self.policy.boundary(state) | {"logits": logits_V} if past.keeps_boundary else {})
        elif is_refresh_point(state.filled, self.config):
            self.policy.refresh(state, past)
            state.moved()

    def mark(self, state: State, past: SessionPast) -> None:
        """An end of turn at the stream's end: a refresh point that doesn't close the segment (design, section 6)."""
        self.choose_at_mark(state, past)
        self.reread(state, past, lambda tokens_T: self.pass_over(tokens_T[None], [state]))

    def choose_at_mark(self, state: State, past: SessionPast) -> None:
        """`mark` without what it reads again."""
        past.journal.begin_mark(state)
        if state.filled and self.config.chooses_at_marks:  # where a segment starts, its close has chosen
            self.policy.refresh(state, past)
            state.moved()

    def reread(self, state: State, past: SessionPast, run: Callable[[Tensor], object]) -> None:
        """Let the latest tokens see what they chose. Nothing else tells of it: it follows from the mark.

        run: passes over tokens, [T], behind the state.
        """
        count = min(self.config.reread_at_marks, state.filled)
        if count and state.closed:
            tokens_T = torch.tensor(past.journal.tokens[state.length - count : state.length])
            state.rewind(count)
            run(tokens_T)
            state.length += count
            state.filled += count

    def resume(self, boundary: dict[str, Tensor], past: SessionPast) -> tuple[State, Tensor]:
        """The state after the last close of `past`, and the logits of its last token, [V]."""
        state = self.policy.resume(boundary, past)
        state.length = past.segments * self.config.segment_tokens
        state.events = past.journal.events_until(state.length)
        return state, boundary["logits"].to(self.model.spec.device)

    def rows_of(self, heads: tuple[int, ...]) -> Tensor:
        """KV heads as an index on the device, made once."""
        if heads not in self._rows:
            self._rows[heads] = torch.tensor(heads, device=self.model.spec.device)
        return self._rows[heads]

    def begin_pass(self, tokens_BT: Tensor, states: Sequence[State], pasts: Sequence[SessionPast]) -> None:
        """Write a pass down before it runs."""
        tokens = tokens_BT.shape[1]
        for row, state, past in zip(tokens_BT.tolist(), states, pasts, strict=True):
            assert 0 < tokens <= self.config.segment_tokens - state.filled
            past.journal.begin_pass(state, row)
            end = state.filled + tokens
            if end == self.config.segment_tokens or is_refresh_point(end, self.config):
                self.policy.prefetch(state, past)

    def _see(self, window: Window, filled: int, q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float) -> Tensor:
        """Append the chunk to the window, then let its queries see the prefix and the segment so far."""
        row, tokens, position = window.base + filled, k_HTD.shape[1], window.position + filled
        q_XTD = q_HGTD.flatten(0, 1)
        if torch.is_grad_enabled():
            rotated_q, rotated_k = self.model.rope(q_XTD, k_HTD, position)
            window.write(row, k_HTD, rotated_k, v_HTD)
        else:
            rotated_q = self.model.rope.into(window.rows(row, tokens), q_XTD, k_HTD, v_HTD, position)
        seen = slice(window.start, row + tokens)
        return self.attention(rotated_q.view(q_HGTD.shape), window.rotated_HND[:, seen], window.v_HND[:, seen], scale)

    def _watch(self, state: State, layer: int, q_HGTD: Tensor) -> None:
        """Keep the latest unrotated queries of the watched cells; no gradient passes through them."""
        for head in range(q_HGTD.shape[0]):
            i = self._watched.get(Cell(layer, head))
            if i is not None:
                window, latest = self.policy.watched_tokens, q_HGTD[head].detach()
                if latest.shape[1] < window:
                    latest = torch.cat([state.queries[i], latest], dim=1)
                state.queries[i] = latest[:, -window:].clone()


class _Pass:
    """One stream's attention in one pass.

    Activation checkpointing calls it again in the backward pass. It then repeats what it did, on the windows that it
    saw, and leaves alone the state, which has moved on.
    """

    def __init__(self, runner: Runner, state: State) -> None:
        self._runner, self._before, self._filled = runner, list(state.layers), state.filled
        self._state: State | None = state

    def __call__(self, layer: int, q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float) -> Tensor:
        windows = self._before[layer]
        if torch.is_grad_enabled():
            windows = [copy.copy(w) for w in windows]
        if self._state is not None:
            self._state.layers[layer] = windows
            self._runner._watch(self._state, layer, q_HGTD)
        if len(windows) == 1:
            return self._runner._see(windows[0], self._filled, q_HGTD, k_HTD, v_HTD, scale)
        out = torch.empty_like(q_HGTD)
        for w in windows:
            heads = self._runner.rows_of(w.heads)
            out[heads] = self._runner._see(w, self._filled, q_HGTD[heads], k_HTD[heads], v_HTD[heads], scale)
        return out

    def end(self) -> None:
        """The state moves on. It is let go of, too: its tensors' graph may hold this, a cycle that nobody collects."""
        self._state = None
