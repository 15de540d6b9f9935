"""Cutting a text into spans by the attention inside it, and an index vector for each (Ltri-LLM, arXiv 2412.04757).

Attention within a meaningful stretch of text shows as a dense lower triangle on the diagonal. Only attention between
tokens close to each other matters here, so it comes as a band: attention_TL[i, l] is what token i pays to token i - l.

Shapes: T tokens, L width of the band, X starts of spans, M lengths of spans, K spans, H heads, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def span_scores(attention_TL: Tensor, theta: float, least: int, most: int) -> Tensor:
    """The score of every span of `least` to `most` tokens, [X, M]: minus infinity where a span would pass the end.

    S(x, y) is the sum of (attention of i to j) - theta over x <= j <= i <= y: theta is what a pair of tokens must be
    worth for a longer span to be a better one. Entry [x, m] is S(x, x + least + m - 1). A 2-D prefix sum along the
    band, first over what a token looks back at, then over the tokens of the span; so each score sums its own triangle
    alone, and equal triangles score the same. L must be at least `most`.
    """
    back_TL = (attention_TL[:, :most] - theta).cumsum(dim=1)
    scores_XM = _by_attended(back_TL).cumsum(dim=1)[:, least - 1 :]
    stop_XM = torch.arange(scores_XM.shape[0])[:, None] + torch.arange(least, most + 1)
    return scores_XM.masked_fill(stop_XM > scores_XM.shape[0], -torch.inf)


def best_spans(scores_XM: Tensor, least: int, overlap: float) -> Iterator[tuple[int, int]]:
    """Non-maximum suppression: spans as (start, length), best first, none of which overlaps a better one too much.

    Too much is an intersection over union above `overlap`. Ties go to the earlier start, then to the shorter span.
    scores_XM: from `span_scores`, with the same `least`; spans of minus infinity don't exist.
    """
    scores, most = scores_XM.clone(), least + scores_XM.shape[1] - 1
    best_X = scores.amax(dim=1)
    while best_X.max() > -torch.inf:
        start = int(best_X.argmax())  # argmax names the first of equals
        length = least + int(scores[start].argmax())
        yield start, length
        first, stop = max(0, start - most + 1), start + length  # no other start reaches the span
        near = scores[first:stop]
        close = _too_close(length, least, most, overlap)[first - (start - most + 1) :]
        near.masked_fill_(close[: near.shape[0]], -torch.inf)
        best_X[first:stop] = near.amax(dim=1)


def tile(spans: Iterable[tuple[int, int]], tokens: int, least: int, most: int) -> list[int]:
    """Lengths of the tiles that cover `tokens` tokens without gap or overlap, from spans given best first.

    1. A token belongs to the first span that covers it. Runs of one owner are tiles, and so are runs of none, the gaps.
    2. From the left, a tile shorter than `least` joins the shorter of its neighbours, the earlier one if they tie.
    3. A tile longer than `most` is cut into the fewest parts that are not, equal but for one token, longer ones first.

    No tile is longer than `most`; none is shorter than `least` if there are as many tokens and most >= 2 * least - 1.
    """
    owner_T = torch.full((tokens,), -1)
    for rank, (start, length) in enumerate(spans):
        covered = owner_T[start : start + length]
        covered[covered < 0] = rank
        if (owner_T >= 0).all():  # later spans own nothing
            break
    runs = torch.unique_consecutive(owner_T, return_counts=True)[1].tolist()
    return [part for run in _join_short(runs, least) for part in _split_long(run, most)]


def votes(attention_TL: Tensor, lengths: list[int]) -> Tensor:
    """The attention that each token receives from the span after its own, [T]; spans of these lengths tile the tokens.

    Nothing follows the last span: its own tokens vote. L must be at least the length of any two spans in a row.
    """
    end_K = torch.tensor(lengths).cumsum(0)
    # A span's voters, [first, stop): from its end to the next one's; the last span's are its own.
    first_K = torch.cat([end_K[:-1], end_K[-1:] - lengths[-1]])
    stop_K = torch.cat([end_K[1:], end_K[-1:]])
    span_T1 = torch.repeat_interleave(torch.tensor(lengths))[:, None]
    voter_TL = torch.arange(attention_TL.shape[0])[:, None] + torch.arange(attention_TL.shape[1])
    votes_TL = (voter_TL >= first_K[span_T1]) & (voter_TL < stop_K[span_T1])
    return _by_attended(attention_TL).where(votes_TL, 0).sum(dim=1)


def index_vectors(keys_HTD: Tensor, votes_T: Tensor, lengths: list[int], vote_tokens: int) -> Tensor:
    """A span's index vector, [H, K, D]: the mean key of its `vote_tokens` tokens that have most votes.

    Ties go to the earlier token; a shorter span takes all of its tokens. Means are taken in fp32 at least.
    """
    length_K = torch.tensor(lengths)
    span_T = torch.repeat_interleave(length_K)
    by_votes = torch.sort(votes_T, descending=True, stable=True).indices
    ranked_T = by_votes[torch.sort(span_T[by_votes], stable=True).indices]  # span by span, best first
    place_v = torch.arange(min(vote_tokens, max(lengths)))
    rows_Kv = (length_K.cumsum(0) - length_K)[:, None] + place_v
    elected_Kv = place_v < length_K[:, None]
    keys_HKvD = keys_HTD[:, ranked_T[rows_Kv.clamp(max=len(ranked_T) - 1)]]
    wide = keys_HKvD.to(torch.promote_types(keys_HTD.dtype, torch.float32))
    total_HKD = wide.where(elected_Kv[..., None], 0).sum(dim=2)
    return (total_HKD / elected_Kv.sum(dim=1, keepdim=True)).to(keys_HTD.dtype)


def _by_attended(band_TL: Tensor) -> Tensor:
    """The same band read by the token that is looked at: [j, l] is band_TL[j + l, l], zero beyond the last token."""
    padded = torch.nn.functional.pad(band_TL, (0, 0, 0, band_TL.shape[1] - 1))
    return padded.unfold(0, band_TL.shape[1], 1).diagonal(dim1=1, dim2=2)


@functools.lru_cache(maxsize=1024)
def _too_close(length: int, least: int, most: int, overlap: float) -> Tensor:
    """Which spans overlap a span of `length` tokens too much, [most - 1 + length, M], by start and length.

    The first row is the start most - 1 tokens before the span's own.
    """
    with torch.inference_mode(False):  # shared by passes of all kinds
        # Whole numbers in fp64: their quotient is rounded once, so an overlap of exactly 0.3 isn't above 0.3.
        start_X1 = torch.arange(1 - most, length, dtype=torch.float64)[:, None]
        length_M = torch.arange(least, most + 1, dtype=torch.float64)
        common_XM = (start_X1 + length_M).clamp(max=length) - start_X1.clamp(min=0)
        common_XM = common_XM.clamp(min=0)
        return common_XM / (length + length_M - common_XM) > overlap


def _join_short(runs: list[int], least: int) -> list[int]:
    runs, i = list(runs), 0
    while i < len(runs) and len(runs) > 1:
        if runs[i] >= least:
            i += 1
            continue
        if i > 0 and (i + 1 == len(runs) or runs[i - 1] <= runs[i + 1]):
            i -= 1
        runs[i : i + 2] = [runs[i] + runs[i + 1]]  # still short, perhaps: look at it again
    return runs


def _split_long(run: int, most: int) -> list[int]:
    parts = -(-run // most)
    size, longer = divmod(run, parts)
    return [size + 1] * longer + [size] * (parts - longer)
