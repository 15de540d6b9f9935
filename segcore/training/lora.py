"""LoRA by peft: small matrices beside a model's own, which alone are trained (arXiv 2106.09685), and their directory.

The layers are peft's, put into the model in place, so that F runs them in training as it runs the model's own. What is
saved is a directory of PEFT's, with a card beside it (`segcore.adapter`); serving merges it (`segcore.merging`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from segcore.adapter import CARD, PEFT_FILES, SELECTORS_FILE, Adapter, hashes
from segcore.config import SegmentConfig
from segcore.errors import ConfigError
from segcore.merging import base_digest, check_base, read_lora
from segcore.model import CausalLM
from segcore.retrieval.query_maps import QueryMaps

_NAME = "default"  # peft's own


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What is trained of a model.

    rank: of each product. alpha: products are scaled by alpha / rank. modules: names of linear layers, as "q_proj";
    None: all of them but the head.
    """

    rank: int = 16
    alpha: float = 32
    modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"rank={self.rank!r} must be a whole number of at least 1")
        if not self.alpha > 0:
            raise ConfigError(f"alpha={self.alpha!r} must be positive")


def add_lora(model: CausalLM, settings: LoraSettings | None = None) -> None:
    """Give the model an adapter, in place: as yet it changes nothing, and it alone asks for gradients.

    Its weights are fp32 at least, whatever the model's own are; their start is drawn from torch's generator.
    Raises ConfigError for a module that the model doesn't have.
    """
    settings = settings or LoraSettings()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=cast(int, settings.alpha),
        target_modules="all-linear" if settings.modules is None else list(settings.modules),
    )
    _inject(model, config)


def save_adapter(model: CausalLM, directory: str | Path, *, base_model: str, segment: SegmentConfig) -> Adapter:
    """Write the adapter that the model trains, for `load_model(base_model, adapter=directory)` and for plain peft.

    LoRA, if it was added, in the model's own precision, which merging rounds to anyway; and the selectors' maps, if
    there are any. base_model: the name by which the model is loaded. segment: the policy that it is trained with. What
    is in the directory under the same names is overwritten; `segcore.json` comes last.
    """
    folder = Path(directory)
    files: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    if hasattr(model.model, "peft_config"):
        _save_lora(model, folder, base_model)
        files += PEFT_FILES
    if model.query_maps is not None:
        model.query_maps.write(folder / SELECTORS_FILE)
        files.append(SELECTORS_FILE)
    adapter = Adapter(folder, base_model, base_digest(model.model), segment, hashes(folder, files))
    adapter.write_card()
    return adapter


def _save_lora(model: CausalLM, folder: Path, base_model: str) -> None:
    config = copy.copy(cast(Any, model.model).peft_config[_NAME])
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    # Sets have no order, and equal adapters should have equal files.
    config.target_modules = sorted(config.target_modules or ())
    config.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(model.model, adapter_name=_NAME)
    tensors = {
        f"base_model.model.{name}": t.detach().to("cpu", model.spec.dtype).contiguous() for name, t in weights.items()
    }
    save_file(tensors, folder / PEFT_FILES[1], metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(model: CausalLM, directory: str | Path, *, name: str = "this model") -> Adapter:
    """Give a model without an adapter the saved one, to train it further. name: of the model, for errors.

    Raises NotFound, and ConfigError for an adapter of another model, or one that isn't plain LoRA.
    """
    adapter = Adapter.read(directory)
    check_base(model.model, name, adapter)
    if adapter.has_selectors:
        model.query_maps = QueryMaps.read(adapter.directory / SELECTORS_FILE, model.spec)
    if not adapter.has_lora:
        return adapter
    pairs, _ = read_lora(model.model, adapter)
    _inject(model, LoraConfig.from_pretrained(str(adapter.directory)))
    for layer, (a_rI, b_Or) in pairs.items():
        lora: Any = model.model.get_submodule(layer)
        lora.lora_A[_NAME].weight.copy_(a_rI)
        lora.lora_B[_NAME].weight.copy_(b_Or)
    return adapter


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The model's own weights alone, for as long as this lasts."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    scales = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update(dict.fromkeys(layer.scaling, 0.0))
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling.update(scale)


def _inject(model: CausalLM, config: PeftConfig) -> None:
    assert not hasattr(model.model, "peft_config"), "the model has an adapter"
    config.inference_mode = False
    try:
        inject_adapter_in_model(config, model.model, adapter_name=_NAME)
    except ValueError as error:
        raise ConfigError(f"the model can't have this adapter: {error}") from error
    for name, parameter in model.model.named_parameters():
        lora = "lora_" in name
        if lora and parameter.dtype.itemsize < torch.float32.itemsize:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(lora)
    model.model.eval()
