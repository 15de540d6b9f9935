"""Next-token cross-entropy, whose logits are never all in memory.

Shapes: T tokens of a segment, C hidden dimension, V vocabulary, n tokens of a piece.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from segcore.model import CausalLM
from segcore.training.stream import IGNORED

# Logits that are in memory at a time: 128 MiB in fp32, and a few times that with their gradients.
LOGITS = 2**25


def head_loss_and_grad(
    model: CausalLM,
    hidden_TC: Tensor,
    targets_T: Tensor,
    weight: float,
    logits: int = LOGITS,
    own_TC: Tensor | None = None,
) -> tuple[float, Tensor]:
    """The summed loss of a segment, and the gradient of `weight` times it with respect to `hidden_TC`.

    The gradient of the head's own parameters is added to their `.grad`. Only targets have logits, a piece at a time,
    by the model's own head; the loss is taken in fp32 at least. So a loss needs its head once, however many backward
    passes through the segment follow. own_TC: the loss is then how far predictions at targets are from those that the
    head makes of these (Kullback-Leibler divergence from theirs), in place of minus log likelihood.
    """
    wide = torch.promote_types(hidden_TC.dtype, torch.float32)
    grad_TC, loss = torch.zeros_like(hidden_TC), torch.zeros((), dtype=wide, device=hidden_TC.device)
    wanted = (targets_T != IGNORED).nonzero().flatten().to(hidden_TC.device)
    targets_T = targets_T.to(hidden_TC.device)
    for rows_n in wanted.split(max(1, logits // model.spec.vocabulary)):
        hidden_nC = hidden_TC.detach()[rows_n].requires_grad_()
        with torch.enable_grad():
            logits_nV = model.head(hidden_nC[None])[0].to(wide)
            if own_TC is None:
                piece = cross_entropy(logits_nV, targets_T[rows_n], reduction="sum")
            else:
                own_nV = model.head(own_TC[rows_n][None])[0].to(wide).log_softmax(dim=-1)
                piece = kl_div(logits_nV.log_softmax(dim=-1), own_nV, reduction="sum", log_target=True)
            (weight * piece).backward()
        assert hidden_nC.grad is not None
        grad_TC[rows_n] = hidden_nC.grad
        loss += piece.detach()
    return loss.item(), grad_TC


@torch.no_grad()
def head_loss_and_hits(
    model: CausalLM, hidden_TC: Tensor, targets_T: Tensor, logits: int = LOGITS
) -> tuple[float, Tensor]:
    """The summed loss of a segment, and at which positions, [T] in host memory, the likeliest token is the target."""
    wide = torch.promote_types(hidden_TC.dtype, torch.float32)
    loss, hits_T = 0.0, torch.zeros(len(targets_T), dtype=torch.bool)
    for rows_n in (targets_T != IGNORED).nonzero().flatten().split(max(1, logits // model.spec.vocabulary)):
        logits_nV = model.head(hidden_TC[rows_n.to(hidden_TC.device)][None])[0].to(wide)
        targets_n = targets_T[rows_n].to(logits_nV.device)
        loss += cross_entropy(logits_nV, targets_n, reduction="sum").item()
        hits_T[rows_n] = (logits_nV.argmax(-1) == targets_n).cpu()
    return loss, hits_T
