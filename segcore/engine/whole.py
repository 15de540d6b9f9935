"""Whole segments on a GPU: one CUDA graph for every stream, whose windows never hold more than prefixes.

A layer attends to a copy of its prefix with the segment behind it, in memory that all layers share; what the close
keeps goes straight into the windows and to past KV, and what it retrieves is read from host memory by the device. So
nothing waits for the host between two segments.

Shapes: L layers, H KV heads, G query heads per KV head, T tokens, N rows of prefix and segment, D head dimension,
V vocabulary, C reader cells, W tokens of the query window, S segments.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from segcore.attention.base import Attention
from segcore.attention.decode import can_decode
from segcore.config import Cell
from segcore.engine.whole_kernels import NUMBERS, Places, Segment, enter, insert
from segcore.model import CausalLM
from segcore.pastkv.session import SessionPast
from segcore.policies.base import Policy
from segcore.policies.retrieving import Left, RetrievingPolicy
from segcore.state import State

log = logging.getLogger(__name__)


class WholeSegments:
    """Passes over whole segments, of a model under a policy. pool: memory that graphs share."""

    def __init__(self, model: CausalLM, policy: Policy[Any], attention: Attention, pool: Any) -> None:
        self._model, self._policy, self._attention, self._pool = model, policy, attention, pool
        whole_heads = model.rope.turns_whole_heads(model.spec.head_dim)
        self._usable = can_decode(model.spec) and whole_heads and _has_full_prefixes(policy)
        self._pass: _Whole | None = None

    def fits(self, state: State, tokens: int) -> bool:
        """Whether `run` takes this pass: over a whole segment, without a backward pass."""
        whole = state.filled == 0 and tokens == self._policy.config.segment_tokens
        return self._usable and whole and not torch.is_grad_enabled()

    def run(self, tokens_T: Tensor, state: State, past: SessionPast) -> Tensor:
        """Logits of the last token, [1, V]. The state's windows are as after the close, but for what it retrieves."""
        if self._pass is None:
            assert isinstance(self._policy, RetrievingPolicy)
            self._pass = _Whole(self._model, self._policy, self._attention, self._pool)
        return self._pass.run(tokens_T, state, past)


def _has_full_prefixes(policy: Policy[Any]) -> bool:
    """Whether a close keeps all that a prefix can have, in places known beforehand, from the first segment on."""
    if not isinstance(policy, RetrievingPolicy) or not policy.by_ends:
        return False
    config = policy.config
    return bool(config.segment_tokens >= max(config.prefix_tokens, policy.watched_tokens))


class _Whole:
    """The pass, and the memory that it works in. Stands in for the model's attention, as `model.Attend`."""

    def __init__(self, model: CausalLM, policy: RetrievingPolicy[Any], attention: Attention, pool: Any) -> None:
        self._model, self._policy, self._attention, self._pool = model, policy, attention, pool
        spec, tokens, first = model.spec, policy.config.segment_tokens, policy.windows(0)[0]
        self._prefix = policy.config.prefix_tokens
        # A graph knows the table by its address: all of it, and held on to.
        model.rope.reserve(first.position + tokens)
        cos_ND, sin_ND = (x.contiguous() for x in model.rope.table)
        cells = (spec.layers, spec.kv_heads)

        def new(*shape: int, dtype: torch.dtype = spec.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=spec.device)

        self._places = Places(
            new(1, spec.head_dim),
            new(*cells, 3, dtype=torch.int64),
            new(len(NUMBERS), *cells, dtype=torch.int32),
            cos_ND,
            sin_ND,
        )
        self._segment = Segment(
            rotated_HND=new(spec.kv_heads, self._prefix + tokens, spec.head_dim),
            values_HND=new(spec.kv_heads, self._prefix + tokens, spec.head_dim),
            turned_THGD=new(tokens, spec.kv_heads, spec.queries_per_kv_head, spec.head_dim),
            kv_TC2D=new(tokens, len(policy.readers), 2, spec.head_dim),
            searched_KTD=new(len(policy.watched), tokens, spec.head_dim),
        )
        watched = (spec.queries_per_kv_head, policy.watched_tokens, spec.head_dim)
        self._queries = [new(*watched) for _ in policy.watched]
        self._watched = {cell: i for i, cell in enumerate(policy.watched)}
        reading = [cell.layer * spec.kv_heads + cell.kv_head for cell in policy.readers]
        self._reading_C = torch.tensor(reading, dtype=torch.int32, device=spec.device)
        self._tokens_T = new(tokens, dtype=torch.int64)
        # Which heads of a layer see alike, and how long a prefix.
        self._kinds = [[(w.heads, sum(policy.prefix_of(i, w))) for w in policy.windows(i)] for i in range(spec.layers)]
        self._heads = {heads: torch.tensor(heads, device=spec.device) for kinds in self._kinds for heads, _ in kinds}
        self._placed: tuple[int, ...] = ()
        self._first = False
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}

    def run(self, tokens_T: Tensor, state: State, past: SessionPast) -> Tensor:
        self._place(state)
        self._tokens_T.copy_(tokens_T, non_blocking=True)
        logits_1V = self._logits(first=state.closed == 0)
        for layer, windows in enumerate(state.layers):
            for window in windows:
                window.start = window.base - sum(self._policy.prefix_of(layer, window))
        state.queries = [q.clone() for q in self._queries]
        past.await_transfer()
        searched = {"keys": self._segment.searched_KTD.clone()}
        state.left = Left(self._segment.kv_TC2D.clone(), searched, self._insert)
        return logits_1V

    def __call__(self, layer: int, q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float) -> Tensor:
        for head in range(len(q_HGTD)):
            i = self._watched.get(Cell(layer, head))
            if i is not None:
                self._queries[i].copy_(q_HGTD[head, :, -self._policy.watched_tokens :])
        kinds, segment = self._kinds[layer], self._segment
        longest = 0 if self._first else max(prefix for _, prefix in kinds)
        enter(layer, q_HGTD, k_HTD, v_HTD, self._places, segment, prefix=longest, first=self._first)
        turned_HGTD = segment.turned_THGD.permute(1, 2, 0, 3)
        out_HGTD, at = torch.empty_like(turned_HGTD), 0
        for heads, prefix in kinds:
            some, rows = slice(at, at + len(heads)), slice(self._prefix - (0 if self._first else prefix), None)
            seen = segment.rotated_HND[some, rows], segment.values_HND[some, rows]
            out = self._attention(turned_HGTD[some], *seen, scale)
            if len(kinds) == 1:
                return out
            out_HGTD[self._heads[heads]] = out
            at = some.stop
        return out_HGTD

    def _logits(self, *, first: bool) -> Tensor:
        """The pass, as a graph from its second time on: the first one compiles what there is to compile."""
        self._first = first
        if first not in self._graphs:
            self._graphs[first] = None
            return self._compute()
        recorded = self._graphs[first]
        if recorded is None:
            graph = torch.cuda.CUDAGraph()
            # Other threads move blocks meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits_1V = self._compute()
            recorded = self._graphs[first] = graph, logits_1V
            log.info("prefill of %d tokens captured as a CUDA graph", len(self._tokens_T))
        graph, logits_1V = recorded
        graph.replay()
        return logits_1V.clone()

    def _compute(self) -> Tensor:
        hidden_1TC = self._model.hidden(self._tokens_T[None], [self])
        return self._model.head(hidden_1TC, all_logits=False)[0]

    def _insert(self, state: State, past: SessionPast) -> None:
        """What the close chose, behind the sinks: by the device, if it reaches all of the past."""
        bulks = past.within_reach()
        if bulks is None:
            self._policy.insert(state, past)
            return
        device = self._tokens_T.device
        addresses_S = torch.tensor([bulk.data_ptr() for bulk in bulks]).to(device, non_blocking=True)
        positions_CR = state.retrieved_CR.to(device, non_blocking=True).contiguous()
        insert(positions_CR, addresses_S, len(self._tokens_T), self._reading_C, self._places)

    def _place(self, state: State) -> None:
        """Let the kernels find a stream's windows."""
        windows = [window for layer in state.layers for window in layer]
        standing = tuple(
            x
            for w in windows
            for x in (w.k_HND.data_ptr(), w.rotated_HND.data_ptr(), w.v_HND.data_ptr(), w.start, w.base, w.position)
        )
        if standing == self._placed:
            return
        self._placed = standing
        offset_LH3 = torch.empty(self._places.offset_LH3.shape, dtype=torch.int64)
        numbers = torch.empty(self._places.numbers.shape, dtype=torch.int32)
        for layer, of_layer in enumerate(state.layers):
            place = 0
            for window in of_layer:
                heads = list(window.heads)
                offset_LH3[layer, heads] = window.offsets(self._places.anchor)
                sinks, retrieved, tail = self._policy.prefix_of(layer, window)
                new_start = window.base - sinks - retrieved - tail
                fixed = (window.start, window.base, window.position, new_start, sinks, tail)
                numbers[: len(fixed), layer, heads] = torch.tensor(fixed, dtype=torch.int32)[:, None]
                for head in heads:
                    cell = Cell(layer, head)
                    own = (self._policy.column(cell), self._watched.get(cell, -1), place)
                    numbers[len(fixed) :, layer, head] = torch.tensor(own, dtype=torch.int32)
                    place += 1
        self._places.offset_LH3.copy_(offset_LH3, non_blocking=True)
        self._places.numbers.copy_(numbers, non_blocking=True)
