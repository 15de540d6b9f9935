"""`duo`: retrieval heads see everything, streaming heads sinks and recent tokens (DuoAttention, arXiv 2410.10819).

As deployed there: 64 sinks and 256 recent tokens, keys at their original positions, and chunked prefill, whose chunk is
our segment. Where ours differs: decode too sees its whole segment beside the recent tokens, so that it repeats prefill
exactly. The retrieval heads are given: by `training.gates`, or a model's published gates, cut at a share.
"""

from __future__ import annotations

from segcore.config import DuoConfig
from segcore.errors import ConfigError
from segcore.model import ModelSpec, Rope
from segcore.policies.hybrid import HybridPolicy


class DuoPolicy(HybridPolicy[DuoConfig]):
    def __init__(self, config: DuoConfig, spec: ModelSpec, rope: Rope) -> None:
        if not config.retrieval:
            raise ConfigError(
                f"policy 'duo' needs the retrieval heads of {spec.architecture}: set retrieval to (layer, KV head)"
                " pairs (`segcore.training.gates` learns them), or choose policy 'streaming' to have none"
            )
        super().__init__(config, spec, rope, config.retrieval)
