"""An adapter's weights, merged into its model for inference: no word of peft, nothing to run beside the model.

A merged model is as quick as its base, packed weights and all. Each weight is summed in fp32 at least and rounded once
to the model's own precision; docs/lab-log.md has what that costs in bfloat16.

Shapes: r rank, O and I outputs and inputs of a layer.
"""

from __future__ import annotations

import json
import math
from hashlib import blake2b
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from segcore.adapter import PEFT_FILES, Adapter
from segcore.errors import ConfigError

# Before the names of modules in a PEFT file.
_ROOT = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# Numbers of each weight whose signs a base's digest reads.
_SAMPLE = 2**16
# What changes a LoRA layer's arithmetic in PEFT, and isn't run here.
_UNSUPPORTED = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
)


def base_digest(model: nn.Module) -> str:
    """Tells a base model by its weights, with or without adapters on it, in whatever precision it was loaded.

    A hash of all names and shapes, and of the signs of each weight's first numbers, which no rounding changes.
    """
    whole = blake2b(digest_size=20)
    for name, weight in sorted((_base_name(name), p) for name, p in model.named_parameters() if "lora_" not in name):
        signs = weight.detach().flatten()[:_SAMPLE].signbit().cpu().numpy()
        whole.update(f"{name} {tuple(weight.shape)} ".encode() + signs.tobytes())
    return whole.hexdigest()


def check_base(model: nn.Module, name: str, adapter: Adapter) -> None:
    """Raise ConfigError if the adapter was trained on another model. name: of this one."""
    if adapter.base and adapter.base != base_digest(model):
        raise ConfigError(
            f"adapter {str(adapter.directory)!r} was trained on {adapter.base_model!r}, and {name!r} has other weights:"
            " load that model, or an adapter of this one",
            adapter=adapter.directory,
            base_model=adapter.base_model,
        )


@torch.no_grad()
def merge_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Add the adapter's low-rank products to the weights, in place.

    Raises ConfigError, before any weight changes, for what isn't plain LoRA of this model's linear layers.
    """
    if not adapter.has_lora:
        return
    pairs, scale = read_lora(model, adapter)
    for name, (a_rI, b_Or) in pairs.items():
        weight = cast(nn.Linear, model.get_submodule(name)).weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        a_rI, b_Or = (x.to(weight.device, wide) for x in (a_rI, b_Or))
        weight.copy_(weight.to(wide) + scale * (b_Or @ a_rI))


def read_lora(model: nn.Module, adapter: Adapter) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """The two factors of each adapted layer, [r, I] and [O, r], by its name, and what their products are scaled by.

    Raises ConfigError for what isn't plain LoRA of the model's linear layers.
    """
    directory = adapter.directory

    def refuse(reason: str) -> ConfigError:
        return ConfigError(
            f"adapter {str(directory)!r} isn't plain LoRA of linear layers: {reason}; merge it with peft, and name the"
            " merged model instead"
        )

    try:
        config: dict[str, Any] = json.loads((directory / PEFT_FILES[0]).read_text())
        tensors = load_file(directory / PEFT_FILES[1])
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"adapter {str(directory)!r} isn't readable: {error}") from error
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise refuse(f"its peft_type is {config.get('peft_type')!r}, its bias {config.get('bias', 'none')!r}")
    if odd := [name for name in _UNSUPPORTED if config.get(name)]:
        raise refuse(f"it sets {', '.join(odd)}")
    names = [name.removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN)]
    if odd := sorted(set(tensors) - {name + end for name in names for end in (_DOWN, _UP)}):
        raise refuse(f"it holds {odd[0]}")
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    try:
        pairs = {name.removeprefix(_ROOT): (tensors[name + _DOWN], tensors[name + _UP]) for name in names}
    except KeyError as error:
        raise refuse(f"it has no {error}") from error
    for name, pair in pairs.items():
        _check_layer(model, adapter, name, *pair)
    return pairs, scale


def _check_layer(model: nn.Module, adapter: Adapter, name: str, a_rI: Tensor, b_Or: Tensor) -> None:
    """Raise ConfigError if the model has no linear layer of this name and shape."""
    layer = dict(model.named_modules()).get(name)
    own = list(layer.weight.shape) if isinstance(layer, nn.Linear) else None
    theirs = [b_Or.shape[0], a_rI.shape[1]]
    if own != theirs or len(a_rI) != b_Or.shape[1]:
        base = f" {adapter.base_model!r}" if adapter.base_model else ""
        raise ConfigError(
            f"adapter {str(adapter.directory)!r} is for another model{base}: it has weights of {theirs} for the layer"
            f" {name!r}, and this model {'no such layer' if own is None else f'has {own}'}; load its own model",
            adapter=adapter.directory,
        )


def _base_name(name: str) -> str:
    return name.replace(".base_layer.", ".")
