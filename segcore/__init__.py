"""segcore: language models over documents of any length, one segment at a time, in memory that doesn't grow.

    model = segcore.load_model()
    engine = segcore.Engine(model.lm, segcore.EngineConfig(segment=segcore.segment_preset(model.name)))

Names are imported when they are first used, so that what only speaks to a service needs neither torch nor time.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segcore.config import CacheConfig, Cell, EngineConfig, SegmentConfig, segment_config
    from segcore.engine.engine import Engine, EngineStats, SessionStats
    from segcore.engine.request import Generation
    from segcore.errors import SegcoreError
    from segcore.presets import DEFAULT_MODEL, segment_preset
    from segcore.sampling import SamplingParams
    from segcore.text import AnswerText, ChatFormat, DocumentEncoder, TextTokenizer
    from segcore.weights import LoadedModel, load_model

__version__ = "0.1.0"

_HOMES = {
    "segcore.config": ("CacheConfig", "Cell", "EngineConfig", "SegmentConfig", "segment_config"),
    "segcore.engine.engine": ("Engine", "EngineStats", "SessionStats"),
    "segcore.engine.request": ("Generation",),
    "segcore.errors": ("SegcoreError",),
    "segcore.presets": ("DEFAULT_MODEL", "segment_preset"),
    "segcore.sampling": ("SamplingParams",),
    "segcore.text": ("AnswerText", "ChatFormat", "DocumentEncoder", "TextTokenizer"),
    "segcore.weights": ("LoadedModel", "load_model"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "DEFAULT_MODEL",
    "AnswerText",
    "CacheConfig",
    "Cell",
    "ChatFormat",
    "DocumentEncoder",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Generation",
    "LoadedModel",
    "SamplingParams",
    "SegcoreError",
    "SegmentConfig",
    "SessionStats",
    "TextTokenizer",
    "load_model",
    "segment_config",
    "segment_preset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'segcore' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
