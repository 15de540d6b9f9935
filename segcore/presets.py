"""What was settled by measurement or by custom: the default model, its segment settings, where caches go."""

from __future__ import annotations

import os
from pathlib import Path

from segcore.config import Cell, SegmentConfig, SegmentedConfig

DEFAULT_MODEL = "smollm2-135m-instruct"

# Other models name their own selectors.
SEGMENT_PRESETS: dict[str, SegmentConfig] = {DEFAULT_MODEL: SegmentedConfig(selectors=(Cell(17, 1), Cell(18, 2)))}


def segment_preset(model: str) -> SegmentConfig:
    """The measured settings of a model; the plain defaults for others."""
    return SEGMENT_PRESETS.get(model, SegmentedConfig())


def cache_directory() -> Path:
    """Where segcore keeps what it can make again: $SEGCORE_CACHE, else a folder of the user's cache."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segcore"
    return Path(os.environ.get("SEGCORE_CACHE") or fallback)
