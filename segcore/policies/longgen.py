"""`longgen`: the middle layers see everything, the others a fixed pattern (LongGen, arXiv 2410.01485).

Its two patterns: sinks and a window ("AttnSink"), or, with `stride_blocks`, a window and every so many-th block of the
stream ("BlockSparse"). Original positions. Where ours differs: the window moves by whole segments and counts tokens,
so a token sees its segment up to itself and at least the window before, at most a segment more than theirs; blocks are
counted from the stream's start, the same for every head, and one that is still arriving is seen as far as it has come.
The middle third is layers [L // 3, L - L // 3): 12 of 32, which is what the paper's savings of KV come to.
"""

from __future__ import annotations

from torch import Tensor

from segcore.config import Cell, LongGenConfig
from segcore.errors import ConfigError
from segcore.model import ModelSpec, Rope
from segcore.policies.hybrid import HybridPolicy


class LongGenPolicy(HybridPolicy[LongGenConfig]):
    def __init__(self, config: LongGenConfig, spec: ModelSpec, rope: Rope) -> None:
        third = spec.layers // 3
        layers = tuple(range(third, spec.layers - third)) if config.full_layers is None else config.full_layers
        if outside := [layer for layer in layers if not 0 <= layer < spec.layers]:
            raise ConfigError(
                f"full_layers {outside} aren't in {spec.architecture}, whose layers are 0 to {spec.layers - 1}"
            )
        super().__init__(config, spec, rope, {Cell(layer, head) for layer in layers for head in range(spec.kv_heads)})

    def fixed(self, positions_N: Tensor) -> Tensor:
        """With a stride, whole blocks of the stream in place of the sinks."""
        if self.config.stride_blocks is None:
            return super().fixed(positions_N)
        return positions_N // self.config.block_tokens % self.config.stride_blocks == 0
