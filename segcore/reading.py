"""How well a model predicts a text, token by token, with the passes that serve and train.

Shapes: T tokens, C hidden dimension, V vocabulary, n tokens of a piece.
"""

from __future__ import annotations

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


@torch.inference_mode()
def token_losses(
    model: CausalLM, config: SegmentConfig, tokens_T: Tensor, *, chunk_tokens: int = 1024, past_bytes: int = 2**33
) -> Tensor:
    """Minus log likelihood of each token but the first, given those before it; in nats, fp32 at least, [T - 1].

    Segments and chunks are serving's, so the likelihood is what generation would have had. Raises LimitExceeded for a
    stream longer than the policy runs, and PastKVError.
    """
    runner = Runner(model, config)
    most = runner.policy.max_stream_tokens
    if most is not None and len(tokens_T) > most:
        raise LimitExceeded(f"{len(tokens_T)} tokens, and the policy runs {most} at most", max_tokens=most)
    manager = PastKVManager(CacheConfig(host_bytes=past_bytes, reuse=False), device=model.spec.device)
    past = SessionPast(manager, runner.policy.layout, root_key("", "reading"))
    state, losses = runner.begin(), []
    try:
        while state.length < len(tokens_T):
            first = state.length
            count = min(tokens_to_next_cut(state.filled, config, chunk_tokens), len(tokens_T) - first)
            hidden_TC = runner.hidden(tokens_T[None, first : first + count], [state], [past])[0]
            runner.arrive(state, past, count, None)
            losses.append(_losses(model, hidden_TC, tokens_T[first + 1 : first + 1 + count]))
    finally:
        past.truncate(0)
        manager.close()
    return torch.cat(losses)


def _losses(model: CausalLM, hidden_TC: Tensor, next_T: Tensor) -> Tensor:
    """Of the tokens that follow; the stream's last position has none."""
    wide, losses = torch.promote_types(hidden_TC.dtype, torch.float32), []
    pieces = torch.arange(len(next_T)).split(max(1, LOGITS // model.spec.vocabulary))
    for rows_n in pieces:
        logits_nV = model.head(hidden_TC[None, rows_n.to(hidden_TC.device)])[0].to(wide)
        losses.append(cross_entropy(logits_nV, next_T[rows_n].to(logits_nV.device), reduction="none").cpu())
    return torch.cat(losses) if losses else hidden_TC.new_empty(0, dtype=wide).cpu()
