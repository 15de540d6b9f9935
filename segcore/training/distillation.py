"""Self-distillation: what a model itself would say, by full attention and without the adapter that it trains.

Of text that nobody asks about, an adapter is to change as little as it can: predictions in segments are drawn to the
model's own, whose hidden states are taken here; `training.loss` has the distance.

Shapes: T tokens, C hidden dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from segcore.errors import InvalidInput
from segcore.model import CausalLM
from segcore.training.lora import without_adapter
from segcore.training.stream import TrainingStream


@torch.no_grad()
def own_hidden(model: CausalLM, stream: TrainingStream) -> Tensor:
    """Hidden states of all tokens, [T, C]. Raises InvalidInput for a stream longer than the model's positions."""
    tokens = len(stream.tokens_T)
    if tokens > model.spec.max_positions:
        raise InvalidInput(
            f"stream {stream.name!r} has {tokens} tokens, and the model itself sees {model.spec.max_positions}: its"
            ' loss can\'t be "own"'
        )
    with without_adapter(model.model):
        return model.hidden(stream.tokens_T[None].to(model.spec.device), [model.attend_in_full])[0]
