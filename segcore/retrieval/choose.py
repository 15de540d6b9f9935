"""Choosing the retrieved prefix: which past tokens the reader cells see next (design, section 6, `global`).

In two steps. By their largest dot products, less what a query likes of keys here and there, some blocks are nominated,
several for each that is chosen. Of these, tokens are judged by the shares of attention that the window's queries would
pay them. A query that likes every key somewhat, as most of a question's words do, says nothing so, and one that knows
what it looks for decides. Largest products alone miss every third fact in 30,000 tokens (docs/lab-log.md, "judging by
shares").

Shapes: C selectors, G query heads of a selector, W tokens of the query window, N past tokens, n some of them, B blocks,
b tokens of a block, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

# "Less a hair": what a block's score loses when it is lent to its neighbours. Large enough to survive fp32 beside
# scores of some hundreds, small against any difference that matters.
# Of log shares it is a thousandth of a share.
NEIGHBOUR_MARGIN = 1e-3


def levels_of(queries_CGWD: Sequence[Tensor], keys_CnD: Tensor, scale: float) -> Tensor:
    """What each query likes of some keys: levels_CGW, the logarithm of its summed exponentials; in fp32 (fp64 for fp64
    models)."""
    wide = torch.promote_types(queries_CGWD[0].dtype, torch.float32)
    pairs = zip(queries_CGWD, keys_CnD, strict=True)
    return torch.stack([(q_GWD.to(wide) @ k_nD.to(wide).T * scale).logsumexp(dim=-1) for q_GWD, k_nD in pairs])


def score_pieces(
    queries_GWD: Sequence[Tensor], keys: Iterable[Tensor], scale: float, levels_CGW: Tensor | None = None
) -> Iterator[Tensor]:
    """Score past tokens by the selectors' query windows, piece by piece, so that memory doesn't depend on N.

    A token's score is the sum, over the selectors' query heads, of its key's largest dot product with any query of
    the window, times `scale`, less the query's level; in fp32 (fp64 for fp64 models), unaveraged, before RoPE.

    queries_GWD: one window per selector. keys: pieces of the past in stream order, [selectors, n, D] each, read once.
    levels_CGW: see `levels_of`; None: zero. Yields scores_n.
    """
    wide = torch.promote_types(queries_GWD[0].dtype, torch.float32)
    queries = [q.to(wide) for q in queries_GWD]
    for piece in keys:
        score = torch.zeros((), dtype=wide, device=queries[0].device)
        for i, (q_GWD, key_nD) in enumerate(zip(queries, piece, strict=True)):
            similarity = q_GWD.flatten(0, 1) @ key_nD.to(device=q_GWD.device, dtype=wide).T
            similarity = similarity.unflatten(0, q_GWD.shape[:2])
            if levels_CGW is not None:
                similarity = similarity - levels_CGW[i, :, :, None] / scale
            score = score + similarity.amax(dim=1).sum(dim=0)
        yield score * scale


def score_tokens(queries_GWD: Sequence[Tensor], keys: Iterable[Tensor], scale: float) -> Tensor:
    """Scores_N of all pieces; see `score_pieces`."""
    return torch.cat(list(score_pieces(queries_GWD, keys, scale)))


def best_of_blocks(scores: Iterable[Tensor], *, first: int, stop: int, block: int) -> Tensor:
    """best_B: the best score of a block's tokens within [first, stop), -inf without one; B = ceil(stop / block).

    scores: pieces of scores_N in stream order, of any lengths; read until `stop`.
    """
    bests: list[Tensor] = []
    at, rest = 0, None
    for piece in scores:
        if at < first or at + len(piece) > stop:
            piece = piece.clone()
            piece[: max(0, first - at)] = -torch.inf
            piece[max(0, stop - at) :] = -torch.inf
        at += len(piece)
        # A block that the piece ends within waits for the next piece.
        if rest is not None and len(rest):
            piece = torch.cat([rest, piece])
        whole = len(piece) // block * block
        bests.append(piece[:whole].view(-1, block).amax(dim=1))
        rest = piece[whole:]
        if at >= stop:
            break
    assert rest is not None, "no scores"
    if len(rest):
        bests.append(rest.amax()[None])
    return torch.cat(bests)[: -(-stop // block)]


def top_blocks(best_B: Tensor, blocks: int) -> Tensor:
    """The indices of the best blocks, best first, ties to the earlier one."""
    good = torch.arange(len(best_B), device=best_B.device)
    # A GPU sorts all sooner than it finds the best few; on a CPU it takes twenty times as long.
    if best_B.is_cpu and 0 < blocks < len(best_B):
        good = (best_B >= best_B.topk(blocks).values[-1]).nonzero().squeeze(1)
    return good[torch.sort(best_B[good], descending=True, stable=True).indices[:blocks]]


def lend(best_B: Tensor) -> Tensor:
    """Blocks' scores, with what neighbours lend; a block without a candidate never wins, whoever its neighbours are."""
    lent_B = best_B.clone()
    lent_B[1:] = torch.maximum(lent_B[1:], best_B[:-1] - NEIGHBOUR_MARGIN)
    lent_B[:-1] = torch.maximum(lent_B[:-1], best_B[1:] - NEIGHBOUR_MARGIN)
    return lent_B.masked_fill_(best_B == -torch.inf, -torch.inf)


def nominate(best_B: Tensor, blocks: int) -> Tensor:
    """The indices of the blocks that are judged, ascending."""
    return top_blocks(lend(best_B), blocks).sort().values


def log_shares(queries_CGWD: Sequence[Tensor], keys_CnD: Tensor, candidate_n: Tensor, scale: float) -> Tensor:
    """Log shares_n of candidates, -inf for the others: the sum, over the selectors' query heads, of the largest share
    that a query of the window gives to a token, of all that it gives to candidates; in fp32 (fp64 for fp64 models),
    before RoPE.

    As logarithms, so that none vanishes, however small, and blocks can be put in order.
    """
    wide = torch.promote_types(queries_CGWD[0].dtype, torch.float32)
    largest = []
    for q_GWD, keys_nD in zip(queries_CGWD, keys_CnD, strict=True):
        scores_GWn = q_GWD.to(wide) @ keys_nD.to(wide).T * scale
        shares_GWn = scores_GWn.masked_fill_(~candidate_n, -torch.inf).log_softmax(dim=-1)
        largest.append(shares_GWn.amax(dim=1))
    return torch.cat(largest).logsumexp(dim=0)


def choose_positions(best_B: Tensor, *, first: int, stop: int, tokens: int, block: int) -> Tensor:
    """The positions in [first, stop) of the chosen blocks, ascending; see `choose_blocks`.

    How many they are follows from the arguments alone, so that a GPU needn't be waited for.
    """
    # Both ends may cut a block.
    order = top_blocks(lend(best_B), -(-tokens // block) + 2)
    positions = (order[:, None] * block + torch.arange(block, device=order.device)).flatten()
    candidates = (positions >= first) & (positions < stop)
    chosen = candidates & (candidates.cumsum(dim=0) <= tokens)
    return torch.where(chosen, positions, stop).sort().values[: min(tokens, stop - first)]


def choose_blocks(scores_N: Tensor, *, first: int, stop: int, tokens: int, block: int) -> Tensor:
    """The positions in [first, stop) that form the retrieved prefix: `tokens`, or all if they are fewer, ascending.

    The stream is cut into blocks of `block` tokens; a block scores its best candidate, and lends its two neighbours
    that score less NEIGHBOUR_MARGIN; the best blocks win, ties to the earlier one, until there are `tokens`: where an
    end of the candidates cuts a block, the next best one gives its first tokens in place of what is missing. Tokens
    outside [first, stop) are no candidates.
    """
    if stop <= first or tokens == 0:
        return torch.empty(0, dtype=torch.long, device=scores_N.device)
    best_B = best_of_blocks([scores_N], first=first, stop=stop, block=block)
    return choose_positions(best_B, first=first, stop=stop, tokens=tokens, block=block)
