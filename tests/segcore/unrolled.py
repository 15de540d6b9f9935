"""What training's gradients must equal: the recurrence written out, one graph per segment's loss (design, section 8).

Two of them. `unrolled` runs F itself over a loss's segments, with gradient for the last K + 1; `one_pass_gradients`
knows no windows, closes or states: one pass of the model over the whole stream, whose attention gathers what each cell
sees, as its method says, and detaches what carries no gradient.

Shapes: T tokens of the stream, t of a pass, N keys that it sees, H KV heads, G query heads per KV head, D head
dimension, C choices, R chosen tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from segcore.config import CacheConfig, Cell, SegmentConfig
from segcore.engine.runner import Runner
from segcore.model import CausalLM
from segcore.pastkv.manager import PastKVManager
from segcore.policies import make_policy
from segcore.policies.base import sinks_and_tail
from segcore.policies.retrieving import RetrievingPolicy
from segcore.segments import tokens_to_next_cut
from segcore.training.stream import IGNORED, TrainingStream
from tests.conftest import tiny_model
from tests.segcore.test_policies import RULES

Depth = int | Literal["all"]
Gradients = dict[str, Tensor]


def trained_model(**options: object) -> CausalLM:
    """A tiny model whose parameters all ask for gradients, in fp64 throughout.

    transformers' RMSNorm works in fp32, so that gradients would depend, by 1e-8, on the order in which they are added.
    """
    model: PreTrainedModel = tiny_model(**options)  # type: ignore[arg-type]
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=child.weight.dtype)
                norm.weight.data.copy_(child.weight)
                setattr(module, name, norm)
    lm = CausalLM(model)
    model.requires_grad_(True)
    return lm


def gradients_of(lm: CausalLM) -> Gradients:
    """The gradients that were added up, which are let go of."""
    found = {name: p.grad for name, p in lm.model.named_parameters() if p.grad is not None}
    lm.model.zero_grad()
    return found


def assert_same_gradients(ours: Gradients, expected: Gradients) -> None:
    """The same parameters, to 1e-9, and not for want of a gradient."""
    assert ours.keys() == expected.keys()
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-9, msg=lambda text, name=name: name + text)


class Serving:
    """A stream that runs through F pass by pass, as the engine runs it."""

    def __init__(self, lm: CausalLM, config: SegmentConfig, stream: TrainingStream, chunk_tokens: int) -> None:
        self.runner, self.config, self.stream, self.chunk_tokens = Runner(lm, config), config, stream, chunk_tokens
        self.state = self.runner.begin()
        self.past = PastKVManager(CacheConfig()).open_stream(self.runner.policy.layout)

    def step(self) -> Tensor:
        """The next pass, and the mark before it if one is due; its logits, [T, V]. `chosen`: what it retrieved."""
        at = self.state.length
        if at in self.stream.marks:
            self.runner.mark(self.state, self.past)
        self.chosen_CR = self.state.retrieved_CR
        stops = [len(self.stream.tokens_T), *self.stream.marks]
        count = min(stop - at for stop in stops if stop > at)
        count = min(count, tokens_to_next_cut(self.state.filled, self.config, self.chunk_tokens))
        tokens_T = self.stream.tokens_T[at : at + count]
        return self.runner.advance(tokens_T, self.state, self.past, all_logits=True)


def losses(config: SegmentConfig, stream: TrainingStream) -> Iterator[tuple[int, int]]:
    """Where the segments that have targets begin and end."""
    for first in range(0, len(stream.tokens_T), config.segment_tokens):
        stop = min(first + config.segment_tokens, len(stream.tokens_T))
        if (stream.targets_T[first:stop] != IGNORED).any():
            yield first, stop


def oldest(config: SegmentConfig, first: int, k: Depth) -> int:
    """The first token that the loss of the segment at `first` reaches."""
    return 0 if k == "all" else max(0, first - k * config.segment_tokens)


def unrolled(
    lm: CausalLM, config: SegmentConfig, stream: TrainingStream, k: Depth, chunk_tokens: int, valid_tokens: int
) -> tuple[float, Gradients]:
    """The summed loss and the gradients, by F with gradient from the K-th segment before each loss on."""
    total = 0.0
    for first, stop in losses(config, stream):
        serving, logits = Serving(lm, config, stream, chunk_tokens), []
        while (at := serving.state.length) < stop:
            with torch.no_grad() if at < oldest(config, first, k) else nullcontext():
                logits_TV = serving.step()
            logits += [logits_TV] if at >= first else []
        loss = cross_entropy(torch.cat(logits), stream.targets_T[first:stop], reduction="sum")
        (loss / valid_tokens).backward()
        total += loss.item()
    return total, gradients_of(lm)


class GatheringAttention:
    """Attention of a whole stream that gathers, for each cell and pass, what the method says.

    chosen: what was retrieved for the pass that began there. Without gradient: that, and tokens before `cut`.
    """

    def __init__(self, lm: CausalLM, config: SegmentConfig, chosen: dict[int, Tensor], cut: int) -> None:
        self.lm, self.config, self.chosen, self.cut = lm, config, chosen, cut
        self.policy = make_policy(config, lm.spec, lm.rope)
        if not isinstance(self.policy, RetrievingPolicy):
            self.rule = RULES[config.policy](config, lm)

    def prefix(
        self, layer: int, head: int, start: int, at: int, k_TD: Tensor, v_TD: Tensor
    ) -> tuple[list[int], list[int]]:
        """The tokens before the segment at `start` that the pass at `at` sees, ascending; and those retrieved."""
        config, cell = self.config, Cell(layer, head)
        if not isinstance(self.policy, RetrievingPolicy):
            return self.rule(layer, head, start, at, None, k_TD, v_TD), []
        reads = cell in self.policy.readers
        own = (config.sink_tokens, config.reader_tail_tokens)
        sinks, tail = sinks_and_tail(start, *(own if reads else self.policy.seen_by_others(cell)))
        retrieved: list[int] = []
        if reads and start:
            chosen_CR = self.chosen[at]
            retrieved = chosen_CR[self.policy.readers.index(cell) if len(chosen_CR) > 1 else 0].tolist()
        return [*range(sinks), *retrieved, *range(start - tail, start)], retrieved

    def __call__(self, layer: int, q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float) -> Tensor:
        size, length = self.config.segment_tokens, k_HTD.shape[1]
        passes = [at for at in self.chosen if at < length]
        heads = []
        for head in range(k_HTD.shape[0]):
            rows = []
            for at, stop in zip(passes, [*passes[1:], length], strict=True):
                start = at - at % size
                prefix, retrieved = self.prefix(layer, head, start, at, k_HTD[head], v_HTD[head])
                seen = [*prefix, *range(start, stop)]
                fixed_N1 = torch.tensor([j < self.cut or j in retrieved for j in seen])[:, None]
                k_ND, v_ND = (torch.where(fixed_N1, x[head, seen].detach(), x[head, seen]) for x in (k_HTD, v_HTD))
                q_GtD, k_ND = self.rotated(q_HGTD[head, :, at:stop], k_ND, seen, len(prefix), at, start)
                future_tN = torch.tensor([[j > t for j in seen] for t in range(at, stop)])
                weights_GtN = (q_GtD @ k_ND.T * scale).masked_fill(future_tN, -math.inf).softmax(dim=-1)
                rows.append(weights_GtN @ v_ND)
            heads.append(torch.cat(rows, dim=1))
        return torch.stack(heads)

    def rotated(
        self, q_GtD: Tensor, k_ND: Tensor, seen: list[int], prefix: int, at: int, start: int
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys at their positions: those of the stream, or those of prefix and segment."""
        if self.policy.original_positions:
            q_at, k_at = torch.arange(at, at + q_GtD.shape[1]), torch.tensor(seen)
        else:
            first = self.config.prefix_tokens
            q_at = torch.arange(first + at - start, first + at - start + q_GtD.shape[1])
            k_at = torch.arange(first - prefix, first - prefix + len(seen))
        return rotated_at(self.lm, q_GtD, q_at), rotated_at(self.lm, k_ND[None], k_at)[0]


def rotated_at(lm: CausalLM, x_HTD: Tensor, position_T: Tensor) -> Tensor:
    """Rotate rows, each to its own position; no two to the same."""
    everywhere = x_HTD.new_zeros(len(x_HTD), int(position_T.max()) + 1, x_HTD.shape[-1])
    return lm.rope.keys(everywhere.index_copy(1, position_T, x_HTD), 0)[:, position_T]


def one_pass_gradients(
    lm: CausalLM, config: SegmentConfig, stream: TrainingStream, k: Depth, valid_tokens: int
) -> Gradients:
    """The gradients, by one pass of the model per loss; choices are those of serving."""
    chosen: dict[int, Tensor] = {}
    with torch.no_grad():
        serving = Serving(lm, config, stream, config.segment_tokens)
        while (at := serving.state.length) < len(stream.tokens_T):
            serving.step()
            chosen[at] = serving.chosen_CR
    for first, stop in losses(config, stream):
        attention = GatheringAttention(lm, config, chosen, oldest(config, first, k))
        logits_TV = lm(stream.tokens_T[:stop], attention, all_logits=True)
        loss = cross_entropy(logits_TV[first:], stream.targets_T[first:stop], reduction="sum")
        (loss / valid_tokens).backward()
    return gradients_of(lm)
