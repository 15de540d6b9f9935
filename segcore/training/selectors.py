"""Teaching the selectors what to look for (design, section 8), by maps of their queries (`retrieval.query_maps`).

At a choice, the loss is minus the log of the softmax mass that the scores put on what is needed. Tasks know which
tokens these are; elsewhere the model's own full attention tells, on streams that are short enough for it: what the
tokens up to the next choice pay to each candidate. Only candidates count, since the others are seen anyway.

The scores are the products by which serving nominates, without levels. No gradient passes to the model: queries and
keys are taken as they are. So it takes no graph of the model, and is taken once for each choice, when it is made.

Shapes: N candidates, C selectors, G query heads of a selector, W tokens of the query window, T tokens of a stream,
t of a part, H KV heads, D head dimension.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from segcore.attention.sdpa import sdpa_attention
from segcore.config import Cell, SegmentConfig
from segcore.errors import InvalidInput, NonFiniteLoss
from segcore.model import CausalLM
from segcore.pastkv.session import SessionPast
from segcore.policies import Policy
from segcore.policies.segmented import SegmentedPolicy
from segcore.retrieval.choose import score_pieces
from segcore.segments import is_refresh_point
from segcore.state import State
from segcore.training.stream import IGNORED, Span, TrainingStream


@dataclass(frozen=True)
class SelectorLoss:
    """Of the choices that were taught, summed: the loss in nats, one each, and the share of what is needed that the
    choice took."""

    total: float = 0.0
    choices: int = 0
    recall: float = 0.0

    def __add__(self, other: SelectorLoss) -> SelectorLoss:
        return SelectorLoss(self.total + other.total, self.choices + other.choices, self.recall + other.recall)


@dataclass(frozen=True)
class Spans:
    """Needed are some spans of candidates, all alike: the loss is the mean over them."""

    spans: tuple[Span, ...]

    def loss(self, log_mass_N: Tensor, first: int) -> Tensor:
        return -torch.stack([log_mass_N[a - first : b - first].logsumexp(0) for a, b in self.spans]).mean()

    def recall(self, chosen: Tensor) -> float:
        took = sum(int(((chosen >= a) & (chosen < b)).sum()) for a, b in self.spans)
        return took / sum(b - a for a, b in self.spans)


@dataclass(frozen=True)
class Mass:
    """Each position is needed by its share, [T]; the candidates' shares are made to add up to one."""

    share_T: Tensor

    def loss(self, log_mass_N: Tensor, first: int) -> Tensor:
        share_N = self.share_T[first : first + len(log_mass_N)].to(log_mass_N)
        return -(share_N / share_N.sum() * log_mass_N).sum()

    def recall(self, chosen: Tensor) -> float:
        return float(self.share_T[chosen.to(self.share_T.device)].sum() / self.share_T.sum())


Lesson = Spans | Mass


def lessons_of(stream: TrainingStream, policy: SegmentedPolicy) -> dict[int, Lesson]:
    """What the stream's marks are known to need, by position: of their candidates, and where there are any."""
    lessons: dict[int, Lesson] = {}
    chosen = set(choice_points(stream, policy.config))
    for mark, spans in stream.needed.items():
        if mark not in chosen:
            continue
        candidates = policy.candidates(mark - mark % policy.config.segment_tokens)
        inside = [(max(a, candidates.start), min(b, candidates.stop)) for a, b in spans]
        if kept := tuple((a, b) for a, b in inside if a < b):
            lessons[mark] = Spans(kept)
    return lessons


def lessons_by_attention(model: CausalLM, stream: TrainingStream, policy: SegmentedPolicy) -> dict[int, Lesson]:
    """What full attention pays to, by choice: the mass from the tokens up to the next choice, where any is predicted.

    Summed over the readers' query heads, for it is they who read what is chosen. Raises InvalidInput for a stream
    longer than the model's positions.
    """
    tokens = len(stream.tokens_T)
    if tokens > model.spec.max_positions:
        raise InvalidInput(
            f"stream {stream.name!r} has {tokens} tokens, and full attention can teach {model.spec.max_positions}"
        )
    targets_T = stream.targets_T != IGNORED
    choices = [*choice_points(stream, policy.config), tokens]
    parts = [(a, b) for a, b in itertools.pairwise(choices) if targets_T[a:b].any()]
    shares = attention_mass(model, stream.tokens_T, parts, frozenset(policy.readers))
    lessons: dict[int, Lesson] = {}
    for (at, _), share_T in zip(parts, shares, strict=True):
        candidates = policy.candidates(at - at % policy.config.segment_tokens)
        inside_T = torch.zeros_like(share_T)
        inside_T[candidates.start : candidates.stop] = share_T[candidates.start : candidates.stop]
        if float(inside_T.sum()) > 0:
            lessons[at] = Mass(inside_T)
    return lessons


def choice_points(stream: TrainingStream, config: SegmentConfig) -> list[int]:
    """Where a stream's prefix is chosen anew, ascending: segments' starts, marks and refresh points."""
    size, length = config.segment_tokens, len(stream.tokens_T)
    marks = {mark for mark in stream.marks if size <= mark < length and config.chooses_at_marks}
    return sorted(marks | {t for t in range(size, length) if t % size == 0 or is_refresh_point(t % size, config)})


@torch.no_grad()
def attention_mass(
    model: CausalLM, tokens_T: Tensor, parts: list[tuple[int, int]], cells: frozenset[Cell]
) -> list[Tensor]:
    """What the tokens [a, b) of each part pay to those before `a` under full attention, summed over cells, [T]."""
    device, tokens = model.spec.device, len(tokens_T)
    wide = torch.promote_types(model.spec.dtype, torch.float32)
    mass = [torch.zeros(tokens, dtype=wide, device=device) for _ in parts]

    def attend(layer: int, q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float) -> Tensor:
        rotated_q, rotated_k = model.rope(q_HGTD.flatten(0, 1), k_HTD, 0)
        rotated_q = rotated_q.view_as(q_HGTD)
        for head in [cell.kv_head for cell in cells if cell.layer == layer]:
            for (a, b), mass_T in zip(parts, mass, strict=True):
                scores_GtN = rotated_q[head, :, a:b].to(wide) @ rotated_k[head, :b].to(wide).T * scale
                future_tN = torch.ones(b - a, b, dtype=torch.bool, device=device).triu(a + 1)
                mass_T[:a] += scores_GtN.masked_fill(future_tN, -math.inf).softmax(dim=-1)[..., :a].sum(dim=(0, 1))
        return sdpa_attention(rotated_q, rotated_k, v_HTD, scale)

    model.hidden(tokens_T[None].to(device), [attend])
    return mass


class Teacher:
    """Takes the loss of each choice of a stream that has a lesson, once, when it has just been made.

    weight: gradients are multiplied by it.
    """

    def __init__(self, policy: Policy[Any], lessons: Mapping[int, Lesson], weight: float, stream: str) -> None:
        self._policy, self._lessons, self._weight, self._stream = policy, dict(lessons), weight, stream
        self.loss = SelectorLoss()

    def see(self, state: State, past: SessionPast) -> None:
        """The prefix was chosen for the next token of `state`."""
        lesson = self._lessons.pop(state.length, None)
        if lesson is not None:
            loss = self._take(lesson, state, past)
            if not math.isfinite(loss):
                raise NonFiniteLoss(
                    f"stream {self._stream!r}: the selectors' loss at token {state.length} is {loss}",
                    stream=self._stream,
                    first=state.length,
                )
            self.loss += SelectorLoss(loss, 1, lesson.recall(state.retrieved_CR[0]))

    def _take(self, lesson: Lesson, state: State, past: SessionPast) -> float:
        assert isinstance(self._policy, SegmentedPolicy)
        candidates = self._policy.candidates(state.closed)
        with torch.enable_grad():
            looking = self._policy.looking(state)
        leaves = [q_GWD.detach().requires_grad_() for q_GWD in looking]
        with torch.no_grad():
            scores = torch.cat(list(self._scores(leaves, past)))
        scores_N = scores[candidates.start : candidates.stop].requires_grad_()
        with torch.enable_grad():
            loss = lesson.loss(scores_N.log_softmax(0), candidates.start)
        (wanted_N,) = torch.autograd.grad(loss, scores_N)
        wanted = torch.zeros_like(scores)
        wanted[candidates.start : candidates.stop] = self._weight * wanted_N
        # A piece of the past at a time, so that the graph of its scores is all that is in memory.
        at = 0
        with torch.enable_grad():
            for piece_n in self._scores(leaves, past):
                piece_n.backward(wanted[at : at + len(piece_n)])
                at += len(piece_n)
        torch.autograd.backward(looking, [leaf.grad for leaf in leaves])
        return loss.item()

    def _scores(self, queries: list[Tensor], past: SessionPast) -> Iterator[Tensor]:
        """The past's scores, as the choice had them, in pieces."""
        assert past.search is not None
        keys = past.search.keys(queries[0].shape[:2].numel())
        return score_pieces(queries, keys, self._policy.spec.head_dim**-0.5)
