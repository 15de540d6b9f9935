"""Literal readings of published methods, loop by loop over plain lists: what the engine's tensors are held against."""

from __future__ import annotations

import itertools
import math

import torch

from segcore.policies.lagkv import EPSILON

# LagKV, from the published formula (arXiv 2504.04704) with EPSILON added to the range.


def lag_shares(lag, following):
    spreads = []
    for token in lag:
        normalised = []
        for c, value in enumerate(token):
            channel = [other[c] for other in following]
            normalised.append((value - min(channel)) / (max(channel) - min(channel) + EPSILON))
        mean = sum(normalised) / len(normalised)
        spreads.append(math.sqrt(sum((z - mean) ** 2 for z in normalised) / (len(normalised) - 1)))  # unbiased
    top = max(spreads)
    total = sum(math.exp(s - top) for s in spreads)
    return [math.exp(s - top) / total for s in spreads]


def lag_scores(k, v, next_k, next_v):
    return [a + b for a, b in zip(lag_shares(k, next_k), lag_shares(v, next_v), strict=True)]


def best_of_lag(scores, count):
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def kept_of_lag(k, v, next_k, next_v, keep):
    return best_of_lag(lag_scores(k, v, next_k, next_v), int(keep * len(k)))


# The paper's choice, from its steps (arXiv 2605.11744, appendix D) and the design's section 6, `cell`.


def summaries(window):
    """Step 2, for one query head: means over windows of 8, stride 4, and of the last 4; queries are lists."""

    def mean(queries):
        return [sum(column) / len(queries) for column in zip(*queries, strict=True)]

    size = min(8, len(window))
    starts = range(0, len(window) - size + 1, 4)
    return [mean(window[i : i + size]) for i in starts] + [mean(window[-4:])]


def anchors(windows, keys, *, first, stop, tokens):
    """Steps 2 to 6 for one cell; windows: the last queries of each of its query heads."""
    best = {}
    for summary in (s for window in windows for s in summaries(window)):
        scores = {n: sum(a * b for a, b in zip(summary, keys[n], strict=True)) for n in range(first, stop)}
        for n in sorted(scores, key=lambda n: (-scores[n], n))[:16]:
            best[n] = max(scores[n], best.get(n, -math.inf))
    nearest = sorted(best, key=lambda n: (-best[n], n))[: tokens // 8]
    chosen = {min(max(a + offset, first), stop - 1) for a in nearest for offset in range(-3, 5)}
    for n in range(first, stop):
        if len(chosen) >= tokens:
            break
        chosen.add(n)
    return sorted(chosen)


# Spans (`ltri`), from the design's section 11.


def span_scores(attention, theta, least, most):
    """S(x, y), by (start, length), from a square of attention: [i][j] is what token i pays to token j."""
    tokens, scores = len(attention), {}
    for x in range(tokens):
        for y in range(tokens):
            if least <= y - x + 1 <= most:
                total = 0.0
                for i in range(x, y + 1):
                    for j in range(x, i + 1):
                        total += attention[i][j] - theta
                scores[x, y - x + 1] = total
    return scores


def best_spans(scores, overlap):
    kept = []
    for start, length in sorted(scores, key=lambda span: (-scores[span], span)):
        tokens = set(range(start, start + length))
        others = [set(range(s, s + n)) for s, n in kept]
        if all(len(tokens & other) / len(tokens | other) <= overlap for other in others):
            kept.append((start, length))
    return kept


def tiles(spans, tokens, least, most):
    owners = [next((k for k, (s, n) in enumerate(spans) if s <= t < s + n), None) for t in range(tokens)]
    tiles = [len(list(run)) for _, run in itertools.groupby(owners)]
    while len(tiles) > 1 and min(tiles) < least:
        i = next(i for i, length in enumerate(tiles) if length < least)
        neighbours = [j for j in (i - 1, i + 1) if 0 <= j < len(tiles)]
        into = min(neighbours, key=lambda j: (tiles[j], j))
        tiles[into] += tiles.pop(i) if into < i else 0
        if into > i:
            tiles[into] += tiles[i]
            del tiles[i]
    parts = []
    for length in tiles:
        count = next(c for c in itertools.count(1) if c * most >= length)
        parts += [len(range(i, length, count)) for i in range(count)]
    return parts


def votes(attention, lengths):
    starts = [sum(lengths[:k]) for k in range(len(lengths))]
    received = []
    for k, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        after = min(k + 1, len(lengths) - 1)
        voters = range(starts[after], starts[after] + lengths[after])
        received += [sum(attention[i][j] for i in voters if i >= j) for j in range(start, start + length)]
    return received


def index_vectors(keys, received, lengths, vote_tokens):
    """Mean keys of one head, span by span."""
    vectors, start = [], 0
    for length in lengths:
        elected = sorted(range(start, start + length), key=lambda t: (-received[t], t))[:vote_tokens]
        vectors.append([sum(keys[t][d] for t in elected) / len(elected) for d in range(len(keys[0]))])
        start += length
    return vectors


def choice_of_spans(spans, scores, first, stop, tokens):
    chosen = []
    for k in sorted(range(len(spans)), key=lambda k: (-scores[k], spans[k])):
        inside = [t for t in range(spans[k][0], sum(spans[k])) if first <= t < stop]
        if len(chosen) + len(inside) > tokens:
            break
        chosen += inside
    return sorted(chosen)


def band(attention, width):
    """The square, token by token, as `segcore.spans` takes it."""
    return torch.tensor(
        [[row[i - back] if back <= i else 0.0 for back in range(width)] for i, row in enumerate(attention)],
        dtype=torch.float64,
    )
