"""What is trained on: a stream of tokens, which of them are to be predicted, and where turns end.

Shape: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from segcore.errors import InvalidInput

# A label that isn't a target, as in transformers.
IGNORED = -100

# Tokens [first, stop) of a stream.
Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class TrainingStream:
    """A document, or a conversation. Raises InvalidInput for what can't be one.

    name: says which one it is, in errors. tokens_T, labels_T: int64 in host memory; token t is to be predicted if label
    t isn't IGNORED (the first never is), and None means all. marks: ends of turns, as indices of the tokens that come
    next; the prefix is chosen anew before these (design, section 6). needed: of a mark, the spans before it that the
    answer after it needs, if they are known; what selectors are taught. distilled: what is to be learnt of each target
    is what the model itself would say there (`training.distillation`), and not the token alone.
    """

    name: str
    tokens_T: Tensor
    labels_T: Tensor | None = None
    marks: tuple[int, ...] = ()
    needed: Mapping[int, tuple[Span, ...]] = field(default_factory=dict)
    distilled: bool = False
    targets_T: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        labels_T = self.tokens_T if self.labels_T is None else self.labels_T
        for name, values_T in (("tokens", self.tokens_T), ("labels", labels_T)):
            if values_T.dtype != torch.int64 or values_T.ndim != 1 or not values_T.is_cpu:
                raise InvalidInput(f"stream {self.name!r}: its {name} must be one row of int64 in host memory")
        if not 0 < len(self.tokens_T) == len(labels_T):
            raise InvalidInput(f"stream {self.name!r}: it needs a label for each token, and at least one token")
        if not all(0 <= mark <= len(self.tokens_T) for mark in self.marks):
            raise InvalidInput(f"stream {self.name!r}: a mark lies outside of its {len(self.tokens_T)} tokens")
        for mark, spans in self.needed.items():
            if mark not in self.marks or not spans or not all(0 <= first < stop <= mark for first, stop in spans):
                raise InvalidInput(
                    f"stream {self.name!r}: what mark {mark} needs must be spans (first, stop) before one of its marks"
                )
        # What each position predicts: the token after it; the last one, nothing.
        targets_T = torch.cat([labels_T[1:], labels_T.new_tensor([IGNORED])])
        object.__setattr__(self, "targets_T", targets_T)

    @property
    def valid_tokens(self) -> int:
        """How many of its tokens are to be predicted."""
        return int((self.targets_T != IGNORED).sum())

    @property
    def answers(self) -> list[range]:
        """Positions that predict an answer: runs of targets, each behind a token that isn't one; of a text, none."""
        wanted_T = torch.cat([torch.tensor([False]), self.targets_T != IGNORED, torch.tensor([False])]).int()
        steps_T = wanted_T.diff()
        starts, stops = (steps_T == 1).nonzero().flatten().tolist(), (steps_T == -1).nonzero().flatten().tolist()
        return [range(start, stop) for start, stop in zip(starts, stops, strict=True) if start > 0]

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raise InvalidInput for ids outside it: on a GPU they would end the process."""
        targets_n = self.targets_T[self.targets_T != IGNORED]
        for name, ids in (("token", self.tokens_T), ("label", targets_n)):
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
                raise InvalidInput(f"stream {self.name!r}: a {name} isn't in the vocabulary of {vocabulary}")
