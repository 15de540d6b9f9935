"""What a worker's device must hold, by formula, so that a run that can't fit ends before it starts.

L layers, C hidden dimension, I of the feed-forward part, V vocabulary, S tokens of a segment,
b bytes of a number, w of a wide one: 4 at least. Streams' past KV lies in host memory and has a budget of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from segcore.config import EngineConfig, SegmentConfig
from segcore.errors import ConfigError, NotFound
from segcore.memory import lines, total
from segcore.model import ModelSpec
from segcore.presets import DEFAULT_MODEL
from segcore.training.loss import LOGITS
from segcore.weights import choose_dtype, default_model_directory
from services.training.config import TrainConfig


def require_memory(config: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError, with each part of the sum, if a worker of this run can't hold it. Loads no weights."""
    shape = _shape(config.model)
    parts = estimate(config, shape, choose_dtype(config.dtype, device), device)
    need, have = sum(parts.values()), config.device_bytes or _free(device)
    if need > have:
        listed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
        raise ConfigError(
            f"a worker would take about {_gib(need)} of its device, which has {_gib(have)}: {listed}. Set"
            " checkpoint_layers, a smaller segment, lora, or more workers with parallel: fsdp"
        )


def estimate(config: TrainConfig, shape: Any, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Bytes by part. shape: the model's configuration, as transformers has it."""
    segment = config.segment_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    parameters, trained = int(model.num_parameters()), _trained_parameters(config, model)
    b, w = dtype.itemsize, max(4, dtype.itemsize)
    shards = config.workers.least if config.workers.parallel == "fsdp" else 1
    own_masters = shards > 1 or (b < w and config.whole)  # an adapter's weights are wide
    return {
        "weights": parameters * b,
        "gradients": trained * w,
        "masters": trained * w // shards if own_masters else 0,
        "optimizer": 2 * trained * w // shards,
        "state": _state_bytes(config, segment, shape, dtype, device),
        "activations": _activation_bytes(config, _graph_tokens(config, segment), shape, b),
        "logits": 0 if config.gates else 3 * w * min(LOGITS, segment.segment_tokens * shape.vocab_size),
    }


def _trained_parameters(config: TrainConfig, model: Any) -> int:
    """All of the model, or the adapter's; selectors' maps and gates are small."""
    if config.whole:
        return int(model.num_parameters())
    if config.lora is None:
        return 0
    linears = ((name.rpartition(".")[2], m) for name, m in model.base_model.named_modules() if isinstance(m, nn.Linear))
    wanted = (m for name, m in linears if config.lora.modules is None or name in config.lora.modules)
    return sum(config.lora.rank * int(linear.in_features + linear.out_features) for linear in wanted)


def _graph_tokens(config: TrainConfig, segment: SegmentConfig) -> int:
    """Tokens whose graph is in memory at a time: a segment's; gates learn from whole streams, as far as is known."""
    if config.gates is None:
        return segment.segment_tokens
    sources = config.data.sources
    return max(n for source in sources for n in (source.lengths if source.tasks else (source.most_chars or 1,)))


def _activation_bytes(config: TrainConfig, size: int, shape: Any, b: int) -> int:
    """What the graph of so many tokens keeps: of each layer its input, and of one, or of all, everything between."""
    wide = max(4, b)
    heads = shape.num_attention_heads * _head_dim(shape)
    # Two norms with their wide copies, queries before and after rotation, attention's output; gate, up, their product.
    layer = size * (2 * shape.hidden_size * (b + wide) + 4 * heads * b + 4 * shape.intermediate_size * b)
    kept = 1 if config.checkpoint_layers else shape.num_hidden_layers
    return int(kept * layer + shape.num_hidden_layers * size * shape.hidden_size * b)


def _state_bytes(
    config: TrainConfig, segment: SegmentConfig, shape: Any, dtype: torch.dtype, device: torch.device
) -> int:
    """A stream's state; a graph has a copy of its windows for each pass of a segment."""
    spec = ModelSpec(
        architecture=shape.model_type,
        layers=shape.num_hidden_layers,
        kv_heads=_kv_heads(shape),
        queries_per_kv_head=shape.num_attention_heads // _kv_heads(shape),
        head_dim=_head_dim(shape),
        scale=1.0,
        vocabulary=shape.vocab_size,
        max_positions=shape.max_position_embeddings,
        dtype=dtype,
        device=device,
    )
    engine = EngineConfig(segment=segment, slots=1, max_sessions=1)
    passes = -(-segment.segment_tokens // config.chunk_tokens)
    state = total(lines(spec, 0, engine, segment.segment_tokens), engine, sessions=1, tokens=segment.segment_tokens)
    return (1 + passes) * state["device"]


def _shape(model: str) -> Any:
    """The model's configuration, as transformers has it; of a GGUF file, from its header."""
    where = Path(default_model_directory() if model == DEFAULT_MODEL else model)
    try:
        if where.suffix == ".gguf":
            return AutoConfig.from_pretrained(where.parent, gguf_file=where.name)
        return AutoConfig.from_pretrained(model if model != DEFAULT_MODEL else where)
    except (OSError, ValueError, KeyError) as error:
        raise NotFound(f"model {model!r} can't be loaded: {str(error).splitlines()[0]}", model=model) from error


def _kv_heads(shape: Any) -> int:
    return int(getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads)


def _head_dim(shape: Any) -> int:
    return int(getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads)


def _free(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
