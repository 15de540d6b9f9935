"""Choosing the retrieved prefix: the rule (`choose`), and indexes of the keys that it is applied to, by name."""

from __future__ import annotations

import torch

from segcore.retrieval.anchors import choose_by_anchors
from segcore.retrieval.base import IndexSpec, KeyIndex
from segcore.retrieval.choose import NEIGHBOUR_MARGIN, choose_blocks, score_tokens
from segcore.retrieval.exhaustive import ExhaustiveIndex
from segcore.retrieval.lowrank import LowRankIndex
from segcore.retrieval.recall import Recall

__all__ = [
    "INDEXES",
    "NEIGHBOUR_MARGIN",
    "IndexSpec",
    "KeyIndex",
    "choose_blocks",
    "choose_by_anchors",
    "make_index",
    "score_tokens",
]

INDEXES: dict[str, type[ExhaustiveIndex] | type[LowRankIndex]] = {
    "exhaustive": ExhaustiveIndex,
    "lowrank": LowRankIndex,
}


def make_index(
    name: str,
    *,
    selectors: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    block: int,
    recall: Recall | None = None,
) -> KeyIndex:
    """An empty index; `name` is a key of INDEXES. recall: where what it finds is counted."""
    return INDEXES[name](
        IndexSpec(
            selectors=selectors,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            block=block,
            recall=recall or Recall(),
        )
    )
