"""`segmented`: sinks, a carried tail and retrieved tokens before a segment (design, sections 3 to 6; arXiv 2605.11744).

With the preset `paper` it is the published method: each reader chooses for itself, by anchors, and half of the heads
see nothing before their segment in most layers. By default it differs: one selection serves all readers (`global`),
every cell has sinks and a tail. In both, unlike the paper's code, queries never choose for tokens before them, the
segment just closed can be retrieved, and a turn mark refreshes the choice; `docs/architecture.md` says why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from segcore.config import Cell, SegmentedConfig
from segcore.errors import ConfigError
from segcore.model import ModelSpec, Rope
from segcore.pastkv.session import SessionPast
from segcore.policies.retrieving import RetrievingPolicy
from segcore.retrieval import KeyIndex, choose_by_anchors, make_index
from segcore.retrieval.query_maps import QueryMaps
from segcore.state import State


class SegmentedPolicy(RetrievingPolicy[SegmentedConfig]):
    by_ends = True

    def __init__(self, config: SegmentedConfig, spec: ModelSpec, rope: Rope) -> None:
        if config.retrieved_tokens and config.selection == "global" and not config.selectors:
            raise ConfigError(
                f"policy 'segmented' needs the selector cells of {spec.architecture}: set selectors to (layer, KV head)"
                " pairs (`segcore heads` finds them), set retrieved_tokens=0 to run without retrieval, or choose"
                " policy 'full'"
            )
        every = {Cell(layer, head) for layer in range(spec.layers) for head in range(spec.kv_heads)}
        readers = every - set(config.segment_only) if config.readers is None else set(config.readers)
        super().__init__(config, spec, rope, readers)
        self._require_cells(config.segment_only)
        self._segment_only = frozenset(config.segment_only)
        self.query_maps: QueryMaps | None = None

    @property
    def watched(self) -> tuple[Cell, ...]:
        """The cells that choose."""
        if not self.readers:
            return ()
        return self.readers if self.config.selection == "cell" else self.config.selectors

    def look_by(self, query_maps: QueryMaps) -> None:
        """Score by mapped queries, if one choice serves all readers. Raises ConfigError for maps of other cells."""
        if self.readers and self.config.selection == "global":
            query_maps.check(self.config.selectors)
            self.query_maps = query_maps

    def seen_by_others(self, cell: Cell) -> tuple[int, int]:
        return (0, 0) if cell in self._segment_only else (self.config.sink_tokens, self.config.tail_tokens)

    def searched(self, state: State) -> dict[str, Tensor]:
        """The segment's keys of the cells that choose, [cells, S, D]."""
        keys: dict[Cell, Tensor] = {}
        for layer in {cell.layer for cell in self.watched}:
            for window in state.layers[layer]:
                rows = slice(window.base, window.base + state.filled)
                keys |= {Cell(layer, head): window.k_HND[i, rows] for i, head in enumerate(window.heads)}
        return {"keys": torch.stack([keys[cell] for cell in self.watched])}

    @property
    def new_search(self) -> Callable[[], KeyIndex] | None:
        if self.config.selection == "cell":
            return None
        return partial(
            make_index,
            self.config.index,
            selectors=len(self.watched),
            head_dim=self.spec.head_dim,
            dtype=self.spec.dtype,
            device=self.spec.device,
            block=self.config.block_tokens,
            recall=self.recall,
        )

    def choose(self, state: State, past: SessionPast, first: int, stop: int) -> Tensor:
        candidates = {"first": first, "stop": stop, "tokens": self.config.retrieved_tokens}
        if past.search is None:
            return choose_by_anchors(state.queries, (piece["keys"] for piece in past.index), **candidates)
        return past.search.search(self.looking(state), block=self.config.block_tokens, **candidates)[None]

    def looking(self, state: State) -> list[Tensor]:
        """The query windows that `global` scores by, one per selector."""
        latest = state.queries
        if state.filled:
            latest = [q_GWD[:, -self.config.question_tokens :] for q_GWD in latest]
        return latest if self.query_maps is None else self.query_maps(latest)
