"""Which KV heads must see everything, learned: the gates of DuoAttention (arXiv 2410.10819).

Each cell's output is mixed, a * full attention + (1 - a) * what the streaming heads of policy `duo` see, on streams
that are short enough for full attention. Gates start at 1. They are moved so that the hidden states of what is
predicted stay those of full attention, by their squared distance, while the sum of all gates is pushed down: cells that
need no more than sinks and a window end near 0. The weights stay. Those with the largest gates are the policy's
retrieval cells (`GatesReport`), which the engine runs: the pattern that is mixed is its own.

As published: Adam with a rate of 0.02, a sparsity weight of 0.05, gates between 0 and 1, retrieval tasks whose answers
alone count. Where ours differs: streams are what training takes, and labels say what is predicted.

Shapes: T tokens, L layers, H KV heads of a layer, G query heads per KV head, D head dimension, C hidden dimension.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from segcore.config import DuoConfig
from segcore.errors import InvalidInput, NonFiniteLoss
from segcore.heads.gates import GatesReport
from segcore.model import CausalLM
from segcore.training.activations import checkpointed
from segcore.training.stream import IGNORED, TrainingStream


@dataclass(frozen=True)
class GateLoss:
    """distance: mean over the predicted tokens of the squared distance of hidden states. open: mean of the gates."""

    distance: float
    open: float


class GateTrainer:
    """Trains one gate for each cell. Its weights frozen, the model isn't changed.

    config: sinks, window and segments of the streaming pattern; its retrieval cells don't matter. sparsity: weight of
    the gates' sum. checkpoint_layers: keep the layers' inputs alone.
    """

    def __init__(
        self, model: CausalLM, config: DuoConfig, *, sparsity: float = 0.05, checkpoint_layers: bool = False
    ) -> None:
        self.model, self.config, self._sparsity, self._checkpoint = model, config, sparsity, checkpoint_layers
        wide = torch.promote_types(model.spec.dtype, torch.float32)
        shape = (model.spec.layers, model.spec.kv_heads)
        self.gates_LH = nn.Parameter(torch.ones(shape, dtype=wide, device=model.spec.device))

    def loss_and_grad(self, stream: TrainingStream, valid_tokens: int) -> GateLoss:
        """Add the gradient of a stream's loss, times its share of `valid_tokens`, to the gates'.

        valid_tokens: targets of all streams of a step, on all workers: then the sum of all gradients is that of the
        mean distance, and of one sum of the gates.
        Raises InvalidInput for a stream that full attention can't run, or of which nothing is predicted, and
        NonFiniteLoss.
        """
        spec = self.model.spec
        if not 0 < len(stream.tokens_T) <= spec.max_positions or not stream.valid_tokens:
            raise InvalidInput(
                f"stream {stream.name!r} has {len(stream.tokens_T)} tokens, of which {stream.valid_tokens} are"
                f" predicted: gates learn from at least one, within {spec.max_positions} positions"
            )
        stream.check_vocabulary(spec.vocabulary)
        wanted = (stream.targets_T != IGNORED).nonzero().flatten().to(spec.device)
        with torch.no_grad():
            expected_nC = self.hidden(stream.tokens_T, None)[wanted]
        with torch.enable_grad(), checkpointed(self.model.layers) if self._checkpoint else nullcontext():
            hidden_nC = self.hidden(stream.tokens_T, self.gates_LH)[wanted]
            wide = self.gates_LH.dtype
            distance = (hidden_nC.to(wide) - expected_nC.to(wide)).square().sum(dim=-1).mean()
            loss = distance + self._sparsity * self.gates_LH.abs().sum()
            if not math.isfinite(loss.item()):
                raise NonFiniteLoss(f"stream {stream.name!r}: the gates' loss is {loss.item()}", stream=stream.name)
            (loss * stream.valid_tokens / valid_tokens).backward()
        return GateLoss(distance.item(), self.gates_LH.mean().item())

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the gates between 0 and 1; after each step of the optimizer."""
        self.gates_LH.clamp_(0, 1)

    def report(self, model: str, share: float, steps: int) -> GatesReport:
        """The gates as they are, and the cells that see everything: this share of all, those with the largest."""
        return GatesReport.of(self.gates_LH.tolist(), self.config, model=model, share=share, steps=steps)

    def hidden(self, tokens_T: Tensor, gates_LH: Tensor | None) -> Tensor:
        """What the model makes logits of, mixed by the gates, or by full attention alone, [T, C]."""
        tokens = len(tokens_T)
        streaming_TT = None if gates_LH is None else self.seen_by_streaming(tokens)

        def attend(layer: int, q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float) -> Tensor:
            rotated_q, rotated_k = self.model.rope(q_HGTD.flatten(0, 1), k_HTD, 0)
            q, k, v = rotated_q.view_as(q_HGTD), rotated_k[:, None], v_HTD[:, None]
            full_HGTD = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            if gates_LH is None:
                return full_HGTD
            near_HGTD = scaled_dot_product_attention(q, k, v, streaming_TT, scale=scale, enable_gqa=True)
            gate_H111 = gates_LH[layer, :, None, None, None].to(full_HGTD.dtype)
            return gate_H111 * full_HGTD + (1 - gate_H111) * near_HGTD

        return self.model.hidden(tokens_T[None].to(self.model.spec.device), [attend])[0]

    def seen_by_streaming(self, tokens: int) -> Tensor:
        """What a streaming head's queries see: sinks, the window before their segment, and it up to themselves."""
        at = torch.arange(tokens, device=self.model.spec.device)
        query_T1, key_1T = at[:, None], at[None]
        near = key_1T >= query_T1 - query_T1 % self.config.segment_tokens - self.config.window_tokens
        return (key_1T <= query_T1) & (near | (key_1T < self.config.sink_tokens))
