"""`ltri`: retrieves semantic spans, cut by the attention of a probe layer (Ltri-LLM, arXiv 2412.04757).

A closed segment is cut, within windows of `local_tokens`, into spans of `span_min_tokens` to `span_max_tokens`, by the
attention that the selectors, retrieval heads of one layer, paid inside it. A span is found by its index vector: the
mean of its keys that drew most attention from the span after it. The selectors' votes choose for every layer: a span
scores, over their query heads, its best dot product with any query of the query window; the best spans are taken
until one doesn't fit into `retrieved_tokens` any more.

Where ours differs. Spans are cut when their segment closes, never in an open one, whose tokens are seen anyway; so
decode repeats prefill exactly. A span has the voted index vector alone, no static one beside it, and each choice is
made anew: spans once recalled have no advantage. Rows before a mark inside the segment saw another prefix, which is
gone at the close: all rows are normalised over the prefix that stands then. The paper's theta, budget and lengths
aren't public: theta, the mean attention over a window's lower triangle, and every default of `LtriConfig` are ours.

Shapes: S tokens of a segment, N rows of a window, L width of a band, G query heads per selector, K spans.
"""

from __future__ import annotations

import torch
from torch import Tensor

from segcore.config import Cell, LtriConfig
from segcore.errors import ConfigError
from segcore.model import ModelSpec, Rope
from segcore.pastkv.session import SessionPast
from segcore.policies.retrieving import RetrievingPolicy
from segcore.retrieval import score_tokens
from segcore.spans import best_spans, index_vectors, span_scores, tile, votes
from segcore.state import State, Window


class LtriPolicy(RetrievingPolicy[LtriConfig]):
    def __init__(self, config: LtriConfig, spec: ModelSpec, rope: Rope) -> None:
        if config.retrieved_tokens and not config.selectors:
            raise ConfigError(
                f"policy 'ltri' needs retrieval heads of one layer of {spec.architecture}: set selectors to"
                " (layer, KV head) pairs (`segcore heads` finds them), set retrieved_tokens=0 to run without retrieval,"
                " or choose policy 'streaming'"
            )
        every = {Cell(layer, head) for layer in range(spec.layers) for head in range(spec.kv_heads)}
        super().__init__(config, spec, rope, every)

    @property
    def watched(self) -> tuple[Cell, ...]:
        """The retrieval heads, all of the probe layer."""
        return self.config.selectors if self.readers else ()

    @property
    def watched_tokens(self) -> int:
        """The probe's attention takes the queries of a whole segment."""
        return max(self.config.segment_tokens, self.config.query_window_tokens)

    def close(self, state: State, past: SessionPast) -> None:
        super().close(state, past)
        # The next segment brings the queries that will cut it; those that choose until then are all that goes on.
        state.queries = [self._choosing(q_GWD).clone() for q_GWD in state.queries]

    @torch.no_grad()
    def searched(self, state: State) -> dict[str, Tensor]:
        """The segment's spans: index vectors, [selectors, K, D], and where they lie, [K, 2] (start, length)."""
        window, heads = self._probe(state), [cell.kv_head for cell in self.watched]
        attention_SL, thetas = self.attention(state)
        lengths = []
        for part_nL, theta in zip(attention_SL.split(self.config.local_tokens), thetas, strict=True):
            lengths += self._cut(part_nL, theta)
        keys = window.k_HND[heads, window.base : window.base + state.filled].cpu()
        length_K = torch.tensor(lengths)
        return {
            "keys": index_vectors(keys, votes(attention_SL, lengths), lengths, self.config.vote_tokens),
            "spans": torch.stack([state.closed + length_K.cumsum(0) - length_K, length_K], dim=1),
        }

    @torch.no_grad()
    def choose(self, state: State, past: SessionPast, first: int, stop: int) -> Tensor:
        """The best spans' positions, at most `retrieved_tokens`; of a span across `first` or `stop`, the part between.

        Equal spans go to the earlier one. The first span that doesn't fit ends the choice.
        """
        queries = [self._choosing(q_GWD) for q_GWD in state.queries]
        scores_K = score_tokens(queries, (piece["keys"] for piece in past.index), self.spec.head_dim**-0.5).cpu()
        start_K, length_K = torch.cat([piece["spans"] for piece in past.index]).unbind(dim=1)
        stop_K = (start_K + length_K).clamp(max=stop)
        start_K = start_K.clamp(min=first)
        order = torch.sort(scores_K, descending=True, stable=True).indices
        order = order[start_K[order] < stop_K[order]]
        fits = (stop_K - start_K)[order].cumsum(0) <= self.config.retrieved_tokens
        chosen = order[fits].sort().values.tolist()
        spans = [torch.arange(int(start_K[k]), int(stop_K[k])) for k in chosen]
        return torch.cat([torch.empty(0, dtype=torch.long), *spans])[None]

    def attention(self, state: State) -> tuple[Tensor, list[float]]:
        """What the full segment's tokens pay to those before them, summed over the selectors' query heads.

        Returns the band of width 2 * span_max_tokens that spans and their votes need (`segcore.spans`), [S, L] in host
        memory, fp32 at least; and, for each window of local_tokens, the mean over its lower triangle. Probabilities
        are true ones, over all that a query sees, prefix included; a window's rows are in memory at a time.
        """
        window, bands, means = self._probe(state), [], []
        for first in range(0, state.filled, self.config.local_tokens):
            stop = min(first + self.config.local_tokens, state.filled)
            rows_nN = self._probabilities(state, window, first, stop)
            own, tokens = rows_nN[:, first - stop :], stop - first
            means.append(float(own.sum()) / (tokens * (tokens + 1) / 2))
            bands.append(_band(rows_nN, window.base - window.start, 2 * self.config.span_max_tokens).cpu())
        return torch.cat(bands), means

    def _probabilities(self, state: State, window: Window, first: int, stop: int) -> Tensor:
        """Attention of the segment's tokens [first, stop) to prefix and segment up to `stop`, [n, N]."""
        seen = slice(window.start, window.base + stop)
        total_nN: Tensor | None = None
        for cell, q_GWD in zip(self.watched, state.queries, strict=True):
            q_GnD = q_GWD[:, -state.filled :][:, first:stop]
            rotated_GnD, _ = self.rope(q_GnD, q_GnD[:0], window.position + first)
            k_ND = window.rotated_HND[cell.kv_head, seen]
            wide = torch.promote_types(k_ND.dtype, torch.float32)
            scores_GnN = rotated_GnD.to(wide) @ k_ND.to(wide).T * self.spec.scale
            future_nN = torch.ones_like(scores_GnN[0], dtype=torch.bool).triu(k_ND.shape[0] - (stop - first) + 1)
            paid_nN = scores_GnN.masked_fill(future_nN, -torch.inf).softmax(dim=-1).sum(dim=0)
            total_nN = paid_nN if total_nN is None else total_nN + paid_nN
        assert total_nN is not None
        return total_nN

    def _probe(self, state: State) -> Window:
        """The probe layer's window: every cell reads, so there is one, and its heads are all."""
        (window,) = state.layers[self.watched[0].layer]
        return window

    def _cut(self, attention_nL: Tensor, theta: float) -> list[int]:
        """Lengths of the spans of one window."""
        least, most = self.config.span_min_tokens, self.config.span_max_tokens
        spans = best_spans(span_scores(attention_nL, theta, least, most), least, self.config.overlap)
        return tile(spans, attention_nL.shape[0], least, most)

    def _choosing(self, q_GWD: Tensor) -> Tensor:
        return q_GWD[:, -self.config.query_window_tokens :]


def _band(rows_nN: Tensor, prefix: int, width: int) -> Tensor:
    """What the last n of N tokens pay to the token l before them, [n, L]; to the prefix, nothing that counts."""
    tokens, seen = rows_nN.shape
    column_N, back_L = (torch.arange(n, device=rows_nN.device) for n in (seen, width))
    column_nL = column_N[-tokens:, None] - back_L
    return rows_nN.gather(1, column_nL.clamp(min=0)).where(column_nL >= prefix, 0)
