"""For inference on CPUs: weights in oneDNN's own layout, and norms and gates in place; the same values, bit for bit.

SmolLM2-135M on two cores: prefill a tenth, decode a quarter faster (docs/lab-log.md).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation


class PackedLinear(nn.Module):
    """Takes a linear layer's place and its weight. Its state_dict is that layer's."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self._packed.to_dense()


class RootMeanSquare(nn.Module):
    """Takes the place of a norm that divides by the root mean square in fp32: the same bits from less memory."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self._epsilon = weight, epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(self._epsilon).rsqrt_()
        return wide.mul_(scale).to(x.dtype).mul_(self.weight)


def _leaner(norm: nn.Module) -> RootMeanSquare | None:
    """The above in a norm's place, if it gives what the norm gives, bit for bit."""
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(epsilon, float) or not _narrow(weight):
        return None
    ours = RootMeanSquare(weight, epsilon)
    probe = torch.randn(64, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.inference_mode():
        return ours if torch.equal(ours(probe), norm(probe)) else None


def pack_linears(model: nn.Module) -> None:
    """Pack the bf16 and fp16 weights of a model that runs on a CPU, each in place of the original. For inference alone.

    Weights that another module shares stay as they are, for packing would double them; so do those of a kind of number
    that this CPU has no instructions for, as bf16 without AVX-512.
    """
    if not torch.backends.mkldnn.is_available():
        return
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and uses[id(child.weight)] == 1 and _packable(child.weight):
                setattr(module, name, PackedLinear(child))
            elif (norm := _leaner(child)) is not None:
                setattr(module, name, norm)
        # A gated MLP's gate is nobody else's: its activation needs no memory of its own.
        if isinstance(getattr(module, "gate_proj", None), PackedLinear) and isinstance(module.act_fn, SiLUActivation):
            module.act_fn = nn.SiLU(inplace=True)
    # Weights may have been read into one piece of memory: it goes once nothing of the rest lies in it.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def is_for_inference(model: nn.Module) -> bool:
    """Whether `pack_linears` changed a model, which can't be trained any more."""
    return any(isinstance(module, (PackedLinear, RootMeanSquare)) for module in model.modules())


def _narrow(weight: Tensor) -> bool:
    return weight.is_cpu and weight.dtype in (torch.bfloat16, torch.float16)


def _packable(weight: Tensor) -> bool:
    return _narrow(weight) and supported(weight.dtype)


def supported(dtype: torch.dtype) -> bool:
    """Whether this CPU has what oneDNN packs numbers of a narrow kind for."""
    of_kind = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return bool(of_kind[dtype]())
