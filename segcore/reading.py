"""How well a model predicts a text, token by token, with the passes that serve and train.

Shapes: T tokens, C hidden dimension, V vocabulary, n tokens of a piece.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from segcore.config import CacheConfig, SegmentConfig
from segcore.engine.runner import Runner
from segcore.errors import LimitExceeded
from segcore.model import CausalLM
from segcore.pastkv.journal import root_key
from segcore.pastkv.manager import PastKVManager
from segcore.pastkv.session import SessionPast
from segcore.segments import tokens_to_next_cut

# Logits that are in memory at a time.
LOGITS = 2**24


class Reading(NamedTuple):
    """How a stream's tokens were predicted.

    losses_T: minus their log likelihoods in nats, fp32 at least. greedy_T: whether each was the likeliest of all.
    """

    losses_T: Tensor
    greedy_T: Tensor


def token_losses(
    model: CausalLM, config: SegmentConfig, tokens_T: Tensor, *, chunk_tokens: int = 1024, past_bytes: int = 2**33
) -> Tensor:
    """Minus log likelihood of each token but the first, given those before it, as `read` has it; [T - 1]."""
    return read(model, config, tokens_T, chunk_tokens=chunk_tokens, past_bytes=past_bytes).losses_T


@torch.inference_mode()
def read(
    model: CausalLM,
    config: SegmentConfig,
    tokens_T: Tensor,
    *,
    first: int = 1,
    mark: int | None = None,
    chunk_tokens: int = 1024,
    past_bytes: int = 2**33,
) -> Reading:
    """How the tokens from `first` on are predicted, each by those before it; [T - first].

    Segments and chunks are serving's, so the likelihood is what generation would have had. mark: an end of turn, as the
    index of the token that comes next. Raises LimitExceeded for a stream longer than the policy runs, and PastKVError.
    """
    assert 1 <= first <= len(tokens_T)
    runner = Runner(model, config)
    most = runner.policy.max_stream_tokens
    if most is not None and len(tokens_T) > most:
        raise LimitExceeded(f"{len(tokens_T)} tokens, and the policy runs {most} at most", max_tokens=most)
    manager = PastKVManager(CacheConfig(host_bytes=past_bytes, reuse=False), device=model.spec.device)
    past = SessionPast(manager, runner.policy.layout, root_key("", "reading"))
    state, found = runner.begin(), []
    try:
        while (at := state.length) < len(tokens_T):
            if at == mark:
                runner.mark(state, past)
            stop = mark if mark is not None and at < mark else len(tokens_T)
            count = min(tokens_to_next_cut(state.filled, config, chunk_tokens), stop - at)
            hidden_TC = runner.hidden(tokens_T[None, at : at + count], [state], [past])[0]
            runner.arrive(state, past, count, None)
            unread = max(0, first - 1 - at)  # positions of this chunk that predict tokens before the first
            if unread < count:
                found.append(_predicted(model, hidden_TC[unread:], tokens_T[at + unread + 1 : at + 1 + count]))
    finally:
        past.truncate(0)
        manager.close()
    losses, greedy = zip(*found, strict=True)
    return Reading(torch.cat(losses), torch.cat(greedy))


def _predicted(model: CausalLM, hidden_TC: Tensor, next_T: Tensor) -> Reading:
    """Of the tokens that follow; the stream's last position has none."""
    wide = torch.promote_types(hidden_TC.dtype, torch.float32)
    losses, greedy = [hidden_TC.new_empty(0, dtype=wide).cpu()], [torch.empty(0, dtype=torch.bool)]
    pieces = torch.arange(len(next_T)).split(max(1, LOGITS // model.spec.vocabulary)) if len(next_T) else ()
    for rows_n in pieces:
        logits_nV = model.head(hidden_TC[None, rows_n.to(hidden_TC.device)])[0].to(wide)
        wanted_n = next_T[rows_n].to(logits_nV.device)
        losses.append(cross_entropy(logits_nV, wanted_n, reduction="none").cpu())
        greedy.append((logits_nV.argmax(dim=-1) == wanted_n).cpu())
    return Reading(torch.cat(losses), torch.cat(greedy))
