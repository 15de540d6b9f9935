"""`streaming`: the stream's first tokens and a window of recent ones (StreamingLLM, arXiv 2309.17453, section 3.2).

As there, positions are those within the cache. Ours differs in that the window moves by whole segments: a token sees
the window before its segment and the segment up to itself, at least what the paper shows it.
"""

from __future__ import annotations

from segcore.config import StreamingConfig
from segcore.model import ModelSpec, Rope
from segcore.pastkv.session import SessionPast
from segcore.policies.base import Policy, segment_ends, write_prefixes
from segcore.state import State, Window


class StreamingPolicy(Policy[StreamingConfig]):
    def __init__(self, config: StreamingConfig, spec: ModelSpec, rope: Rope) -> None:
        super().__init__(config, spec, rope)
        self._require_positions(config.prefix_tokens + config.segment_tokens)

    def windows(self, layer: int) -> list[Window]:
        rows = self.config.prefix_tokens
        return [self._window(range(self.spec.kv_heads), prefix=rows, position=rows)]

    def close(self, state: State, past: SessionPast) -> None:
        sinks, tail = self.config.sink_tokens, self.config.window_tokens
        write_prefixes([(w, *segment_ends(w, state, sinks, tail)) for (w,) in state.layers], self.rope)
        state.filled = 0
