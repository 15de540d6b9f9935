"""Passes of one token as CUDA graphs: hundreds of launches become one.

Shapes: L layers, B streams, H KV heads, G query heads per KV head, D head dimension, V vocabulary, C watched cells.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segcore.attention.decode import Places, can_decode, decode_attention
from segcore.config import Cell
from segcore.model import AttendTogether, CausalLM
from segcore.policies.base import Policy
from segcore.state import State

log = logging.getLogger(__name__)


class DecodeGraphs:
    """A graph for each width that is asked for. pool: memory that graphs share."""

    def __init__(self, model: CausalLM, policy: Policy[Any], pool: Any) -> None:
        self._model, self._policy, self._pool = model, policy, pool
        self._graphs: dict[int, _Graph] = {}
        self._usable = can_decode(model.spec) and model.rope.turns_whole_heads(model.spec.head_dim)

    def usable(self) -> bool:
        """Whether `run` can be called now: on a GPU with Triton, without a backward pass."""
        return self._usable and not torch.is_grad_enabled()

    def run(self, tokens_B1: Tensor, states: Sequence[State], width: int) -> Tensor:
        """Logits of the token of each stream, [B, 1, V]; as `Runner.forward`, whose other duties aren't done here."""
        for state in states:
            state.reserve(1, self._policy.config.segment_tokens)
        graph = self._graphs.get(width)
        if graph is None:
            graph = self._graphs[width] = _Graph(self._model, self._policy, width, self._pool)
        return graph.run(tokens_B1, states)


class _Together(AttendTogether):
    """Attention of a batch from the places of its windows; keeps the queries of watched cells."""

    def __init__(self, model: CausalLM, policy: Policy[Any], width: int) -> None:
        spec, device = model.spec, model.spec.device
        shape, watched = (spec.layers, width, spec.kv_heads), policy.watched
        # A graph knows the table by its address: all of it, and held on to.
        model.rope.reserve(policy.max_stream_tokens or policy.windows(0)[0].position + policy.config.segment_tokens)
        self._cos_ND, self._sin_ND = (x.contiguous() for x in model.rope.table)
        # A row that streams which only pad the batch write to.
        self.anchor = torch.zeros((1, spec.head_dim), dtype=spec.dtype, device=device)
        self.filled_B = torch.zeros(width, dtype=torch.int32, device=device)
        self.offset_LBH3 = torch.zeros((*shape, 3), dtype=torch.int64, device=device)
        self.rows_3LBH = torch.zeros((3, *shape), dtype=torch.int32, device=device)
        self._watched = {cell: i for i, cell in enumerate(watched)}
        self.queries_CBGD = torch.zeros(
            (len(watched), width, spec.queries_per_kv_head, spec.head_dim), dtype=spec.dtype, device=device
        )

    def __call__(self, layer: int, q_BHGTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, scale: float) -> Tensor:
        q_BHGD = q_BHGTD[:, :, :, 0]
        for head in range(q_BHGD.shape[1]):
            i = self._watched.get(Cell(layer, head))
            if i is not None:
                self.queries_CBGD[i].copy_(q_BHGD[:, head])
        start, base, position = self.rows_3LBH[:, layer]
        places = Places(self.anchor, self.offset_LBH3[layer], start, base, position, self.filled_B)
        k_BHD, v_BHD = k_BHTD[:, :, 0], v_BHTD[:, :, 0]
        out = decode_attention(q_BHGD, k_BHD, v_BHD, places, self._cos_ND, self._sin_ND, scale)
        return out[:, :, :, None]

    def place(self, stream: int, state: State) -> None:
        """Take a stream's windows for one of the batch's."""
        layers, _, heads = self.rows_3LBH.shape[1:]
        offset = torch.empty((layers, heads, 3), dtype=torch.int64)
        rows = torch.empty((3, layers, heads), dtype=self.rows_3LBH.dtype)
        for layer, windows in enumerate(state.layers):
            for window in windows:
                at = list(window.heads)
                offset[layer, at] = window.offsets(self.anchor)
                values = torch.tensor([window.start, window.base, window.position], dtype=rows.dtype)
                rows[:, layer, at] = values[:, None]
        self.offset_LBH3[:, stream] = offset.to(self.offset_LBH3.device)
        self.rows_3LBH[:, :, stream] = rows.to(self.rows_3LBH)

    def pad(self, stream: int) -> None:
        """Let a stream be padding."""
        self.offset_LBH3[:, stream] = 0
        self.rows_3LBH[:, :, stream] = 0


class _Graph:
    """One width's."""

    def __init__(self, model: CausalLM, policy: Policy[Any], width: int, pool: Any) -> None:
        self._model, self._together, self._window = model, _Together(model, policy, width), policy.watched_tokens
        self._placed: list[int | None] = [None] * width
        # Tokens, and how many the open segments have: read from host memory by the graph itself.
        self._given_2B = torch.zeros((2, width), dtype=torch.int64, pin_memory=True)
        self._rows_2B = self._given_2B.numpy()
        self._on_device_2B = torch.zeros((2, width), dtype=torch.int64, device=model.spec.device)
        self._done = torch.cuda.Event()
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(model.spec.device)
        stream.wait_stream(torch.cuda.current_stream(model.spec.device))
        with torch.cuda.stream(stream):  # compiles what there is to compile
            for _ in range(3):
                self._pass()
        torch.cuda.current_stream(model.spec.device).wait_stream(stream)
        # Other threads move blocks meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._logits_B1V = self._pass()
        log.info("decode of %d streams captured as a CUDA graph", width)

    def run(self, tokens_B1: Tensor, states: Sequence[State]) -> Tensor:
        self._place(states)
        self._done.synchronize()
        self._rows_2B[:] = 0
        self._rows_2B[0, : len(states)] = tokens_B1[:, 0].numpy()
        self._rows_2B[1, : len(states)] = [state.filled for state in states]
        self._graph.replay()
        self._done.record()
        for b, state in enumerate(states):
            for i, seen in enumerate(state.queries):
                before = seen[:, max(0, seen.shape[1] + 1 - self._window) :]
                state.queries[i] = torch.cat([before, self._together.queries_CBGD[i, b][:, None]], dim=1)
        return self._logits_B1V[: len(states)].clone()

    def _place(self, states: Sequence[State]) -> None:
        for stream, placed in enumerate(self._placed):
            version = states[stream].version if stream < len(states) else None
            if version != placed:
                if version is None:
                    self._together.pad(stream)
                else:
                    self._together.place(stream, states[stream])
                self._placed[stream] = version

    def _pass(self) -> Tensor:
        tokens_B, filled_B = self._on_device_2B.copy_(self._given_2B, non_blocking=True)
        self._together.filled_B.copy_(filled_B)
        hidden_B1C = self._model.hidden(tokens_B[:, None], self._together)
        return self._model.head(hidden_B1C, all_logits=True)
