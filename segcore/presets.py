"""What was settled by measurement, publication or custom: the default model, segment settings, where caches go."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segcore.adapter import CARD, Adapter
from segcore.config import Cell, SegmentConfig, SegmentedConfig, segment_config
from segcore.errors import ConfigError
from segcore.heads.gates import read_report
from segcore.heads.report import HeadsReport

DEFAULT_MODEL = "smollm2-135m-instruct"

# Models whose cells were searched with `segcore heads`; for others it takes some minutes.
SHIPPED_HEADS = {DEFAULT_MODEL: Path(__file__).parent / "data" / "heads" / f"{DEFAULT_MODEL}.json"}

# Adapters that are part of the package: what a model is served with, unless another is named, or none.
SHIPPED_ADAPTERS = {DEFAULT_MODEL: Path(__file__).parent / "data" / "adapters" / DEFAULT_MODEL}

# So many of a question's tokens see what it chose (docs/lab-log.md, "what reading again is worth").
REREAD_TOKENS = 64

# The heads of Llama-2-7B, 32 layers of 32, that look back (arXiv 2605.11744): its best 16 retrieval heads by index, and
# the layers that read. The paper's text has layer 18 for 16; its code, and the model's best retrieval heads, have 16.
PAPER_MODEL, PAPER_LAYERS = "llama-2-7b", 32
LONG_HEADS = (0, 1, 2, 4, 9, 12, 14, 15, 16, 18, 19, 22, 23, 26, 29, 30)
LONG_LAYERS = (6, 8, 11, 16)


def segment_preset(model: str, name: str = "default") -> SegmentConfig:
    """The settings of a model: "default", those it was trained with, if its directory says so, or measured for it, or
    else plain defaults; "paper", the published ones of Llama-2-7B and its fine-tunings.

    Raises ConfigError for another name, and for "paper" with a model whose name isn't one of Llama-2-7B.
    """
    if name == "default":
        if (Path(model) / CARD).is_file():
            return read_card(Path(model) / CARD)
        if model in SHIPPED_HEADS:
            return HeadsReport.read(SHIPPED_HEADS[model]).apply(SegmentedConfig(reread_tokens=REREAD_TOKENS))
        return SegmentedConfig()
    if name != "paper":
        raise ConfigError(f"unknown preset {name!r}; known: default, paper")
    if PAPER_MODEL not in model.lower():
        raise ConfigError(f"preset 'paper' names heads of Llama-2-7B, not of {model!r}; choose preset 'default'")
    return paper_preset()


def find_adapter(model: str, adapter: str | Path | None) -> Adapter | None:
    """A model's adapter by name: "default", the one that is shipped for it, if any; "none", or None; or a directory.

    Raises NotFound, ConfigError.
    """
    if adapter == "default":
        adapter = SHIPPED_ADAPTERS.get(model)
    return None if adapter is None or adapter == "none" else Adapter.read(adapter)


def model_segment(
    model: str,
    options: Mapping[str, Any],
    *,
    preset: str = "default",
    adapter: str | Path | None = None,
    trained: SegmentConfig | None = None,
    heads: Path | None = None,
) -> SegmentConfig:
    """A preset with some options changed, or a policy's defaults with them.

    options: "policy", and what differs from the preset or from the policy's defaults. adapter: as `find_adapter` takes
    it; what it was trained with, or else `trained`, comes before the model's preset. heads: a file of `segcore heads`,
    or of learned gates, whose cells take the place of the preset's. Raises NotFound, ConfigError.
    """
    found = find_adapter(model, adapter)
    trained = trained if found is None else found.segment
    presets = [*([] if trained is None else [trained]), segment_preset(model, preset)]
    changed = dict(options)
    policy = changed.pop("policy", presets[0].policy)
    inherited = next((dataclasses.asdict(known) for known in presets if known.policy == policy), {})
    config = segment_config(policy, **inherited | changed)
    return config if heads is None else read_report(heads).apply(config)


def write_card(folder: Path, segment: SegmentConfig) -> None:
    """Say beside a model's weights under which policy they were trained: its preset from now on."""
    options = {"policy": segment.policy, **dataclasses.asdict(segment)}
    (folder / CARD).write_text(json.dumps({"version": 1, "segment": options}, indent=1) + "\n")


def read_card(file: Path) -> SegmentConfig:
    """The policy in such a file. Raises ConfigError."""
    try:
        options = dict(json.loads(file.read_text())["segment"])
        return segment_config(options.pop("policy"), **options)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error.message}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} doesn't say under which policy a model was trained: {error!r}") from error


def paper_preset() -> SegmentedConfig:
    """Segmented execution as published (arXiv 2605.11744): half of the heads look back, without a tail."""
    readers = {Cell(layer, head) for layer in LONG_LAYERS for head in LONG_HEADS}
    long = {Cell(layer, head) for layer in range(PAPER_LAYERS) for head in LONG_HEADS}
    return SegmentedConfig(
        segment_tokens=4096,
        selection="cell",
        sink_tokens=0,
        tail_tokens=512,
        reader_tail_tokens=0,
        retrieved_tokens=512,
        query_window_tokens=64,
        readers=tuple(readers),
        segment_only=tuple(long - readers),
    )


def cache_directory() -> Path:
    """Where segcore keeps what it can make again: $SEGCORE_CACHE, else a folder of the user's cache."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segcore"
    return Path(os.environ.get("SEGCORE_CACHE") or fallback)
