"""What was settled by measurement or by custom: the default model, its segment settings, where caches go."""

from __future__ import annotations

import os
from pathlib import Path

from segcore.config import SegmentConfig
from segcore.heads.report import HeadsReport

DEFAULT_MODEL = "smollm2-135m-instruct"

# Models whose cells were searched with `segcore heads`; for others it takes some minutes.
SHIPPED_HEADS = {DEFAULT_MODEL: Path(__file__).parent / "data" / "heads" / f"{DEFAULT_MODEL}.json"}


def segment_preset(model: str) -> SegmentConfig:
    """The measured settings of a model; the plain defaults for others."""
    plain = SegmentConfig()
    return HeadsReport.read(SHIPPED_HEADS[model]).apply(plain) if model in SHIPPED_HEADS else plain


def cache_directory() -> Path:
    """Where segcore keeps what it can make again: $SEGCORE_CACHE, else a folder of the user's cache."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segcore"
    return Path(os.environ.get("SEGCORE_CACHE") or fallback)
