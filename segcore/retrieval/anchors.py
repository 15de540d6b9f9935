"""Each cell's own choice, by anchors: the published operator (design, section 6, `cell`; arXiv 2605.11744, app. D).

Shapes: G query heads of a cell, W tokens of the query window, s summaries, n tokens of a piece, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# The published operator's numbers (arXiv 2605.11744, appendix D).
SUMMARY_TOKENS, SUMMARY_STRIDE, LATEST_TOKENS = 8, 4, 4
TOKENS_PER_SUMMARY = 16
BEFORE_ANCHOR, AFTER_ANCHOR = 3, 4


def summarise(queries_GWD: Tensor) -> Tensor:
    """Means over windows of 8 queries, stride 4, and the mean of the last 4, for each query head: [summaries, D].

    A query window shorter than 8 tokens has one window, itself.
    """
    windows_GsDw = queries_GWD.unfold(1, min(SUMMARY_TOKENS, queries_GWD.shape[1]), SUMMARY_STRIDE)
    latest_G1D = queries_GWD[:, -LATEST_TOKENS:].mean(dim=1, keepdim=True)
    return torch.cat([windows_GsDw.mean(dim=-1), latest_G1D], dim=1).flatten(0, 1)


def choose_by_anchors(
    queries_GWD: Sequence[Tensor], keys: Iterable[Tensor], *, first: int, stop: int, tokens: int
) -> Tensor:
    """Each cell's own choice (design, section 6, `cell`; arXiv 2605.11744, appendix D): [cells, R] positions.

    A past token scores its unrotated key's dot product with each summary of the cell's query window; each summary
    names its best 16 tokens, a token named twice keeps its better score, and the best tokens/8 are anchors. An anchor
    brings the 3 tokens before it and the 4 after it. Too few are filled with the earliest tokens not taken, so that
    R is `tokens`, or all there are in [first, stop). Ties go to the earlier token. `keys` as in `score_tokens`.
    """
    wide = torch.promote_types(queries_GWD[0].dtype, torch.float32)
    summaries = [summarise(q.to(wide)) for q in queries_GWD]
    named = [_Named(s.shape[0], s) for s in summaries]
    start = 0
    for piece in keys:
        low, high = max(first - start, 0), min(stop - start, piece.shape[1])
        if low < high:
            for cell, key_nD in zip(named, piece, strict=True):
                cell.offer(key_nD[low:high].to(device=cell.queries.device, dtype=wide), start + low)
        start += piece.shape[1]
    return torch.stack([_around_anchors(cell, first=first, stop=stop, tokens=tokens) for cell in named])


class _Named:
    """The best tokens so far of each summary of a cell: scores and positions, [summaries, <=16] each."""

    def __init__(self, count: int, queries_sD: Tensor) -> None:
        self.queries = queries_sD
        self.scores = queries_sD.new_empty((count, 0))
        self.positions = torch.empty((count, 0), dtype=torch.long, device=queries_sD.device)

    def offer(self, key_nD: Tensor, start: int) -> None:
        """Let the tokens at start, start + 1, ... compete."""
        scores_sn = self.queries @ key_nD.T
        positions_n = torch.arange(start, start + key_nD.shape[0], device=scores_sn.device)
        scores = torch.cat([self.scores, scores_sn], dim=1)
        positions = torch.cat([self.positions, positions_n.expand_as(scores_sn)], dim=1)
        # Stable, and earlier tokens stand first: ties go to them.
        order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :TOKENS_PER_SUMMARY]
        self.scores, self.positions = scores.gather(1, order), positions.gather(1, order)


def _around_anchors(cell: _Named, *, first: int, stop: int, tokens: int) -> Tensor:
    """The positions that a cell's best tokens bring, ascending; always min(tokens, stop - first) of them."""
    if stop <= first:
        return torch.empty(0, dtype=torch.long)
    best_N = cell.scores.new_full((stop - first,), -torch.inf)
    best_N.scatter_reduce_(0, cell.positions.flatten() - first, cell.scores.flatten(), "amax")
    width = BEFORE_ANCHOR + 1 + AFTER_ANCHOR
    order = torch.sort(best_N, descending=True, stable=True).indices[: tokens // width]
    anchors = order[best_N[order] > -torch.inf] + first
    around = anchors[:, None] + torch.arange(-BEFORE_ANCHOR, AFTER_ANCHOR + 1, device=anchors.device)
    taken_N = torch.zeros(stop - first, dtype=torch.bool, device=anchors.device)
    taken_N[around.clamp(first, stop - 1).flatten() - first] = True
    missing = min(tokens, stop - first) - int(taken_N.sum())
    taken_N[(~taken_N).nonzero().flatten()[:missing]] = True
    return taken_N.nonzero().flatten().cpu() + first
