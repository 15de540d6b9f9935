"""segcore: language models over documents of any length, one segment at a time, in memory that doesn't grow.

    model = segcore.load_model()
    engine = segcore.Engine(model.lm, segcore.EngineConfig(segment=segcore.segment_preset(model.name)))
"""

from segcore.config import CacheConfig, Cell, EngineConfig, SegmentConfig
from segcore.engine.engine import Engine, EngineStats, SessionStats
from segcore.engine.request import Generation
from segcore.engine.sampler import SamplingParams
from segcore.errors import SegcoreError
from segcore.text import AnswerText, ChatFormat, DocumentEncoder, TextTokenizer
from segcore.weights import DEFAULT_MODEL, LoadedModel, load_model, segment_preset

__version__ = "0.1.0"

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
    "segment_preset",
]
