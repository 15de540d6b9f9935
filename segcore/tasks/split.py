"""Which of two splits a text belongs to."""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal

Split = Literal["train", "eval"]
SPLITS: tuple[Split, Split] = ("train", "eval")


def split_of(text: str) -> Split:
    """The split that a name or a value belongs to: a quarter are for evaluation."""
    return "eval" if blake2b(text.encode(), digest_size=1).digest()[0] % 4 == 0 else "train"
