"""CUDA graphs of a trainer's work, and what recorded passes share: their attention, and the gradients that they leave.

Shapes: T tokens, H KV heads, G query heads per KV head, D head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from segcore.config import Cell
from segcore.engine.runner import Runner


class GradientSums:
    """Gradients of a model's parameters, summed where graphs find them, in fp32 at least."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        wide = [torch.promote_types(p.dtype, torch.float32) for p in self.parameters]
        self._sums = [torch.zeros_like(p, dtype=dtype) for p, dtype in zip(self.parameters, wide, strict=True)]

    def leaves(self) -> Leaves:
        return Leaves(self.model, self.parameters)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """One of each parameter; or none at all, where nobody asked for them."""
        for total, gradient in zip(self._sums, gradients, strict=False):
            if gradient is not None:
                total += gradient

    def take(self) -> list[Tensor]:
        """What was added since this was last asked."""
        found = [total.to(p.dtype, copy=True) for p, total in zip(self.parameters, self._sums, strict=True)]
        for total in self._sums:
            total.zero_()
        return found


class Leaves:
    """A model's parameters, in the same memory, as leaves of a recording's own.

    A parameter's node in autograd is on the stream where a graph that lives first met it, and a backward pass that is
    recorded on another may not wait for that.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.tensors = [nn.Parameter(p.detach()) for p in parameters]
        mine = dict(zip(map(id, parameters), self.tensors, strict=True))
        held = [(module._parameters, name, p) for module in model.modules() for name, p in module._parameters.items()]
        self._places = [(holder, name, p, mine[id(p)]) for holder, name, p in held if id(p) in mine]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model's passes within are over these."""
        for holder, name, _, mine in self._places:
            holder[name] = mine
        try:
            yield
        finally:
            for holder, name, parameter, _ in self._places:
                holder[name] = parameter


class _OfHeads(Protocol):
    @property
    def heads(self) -> tuple[int, ...]: ...


Seen = TypeVar("Seen", bound=_OfHeads)


class RecordedAttention(ABC, Generic[Seen]):
    """Attention of a recorded pass: what it sees is given, what it makes is handed out. It may be called again.

    layers: what is known of each window. given: as many tensors of each window, one window behind the other.
    """

    def __init__(self, runner: Runner, layers: Sequence[Sequence[Seen]], given: Sequence[Tensor]) -> None:
        count = len(given) // sum(map(len, layers))
        each = iter([tuple(given[i : i + count]) for i in range(0, len(given), count)])
        self.runner, self.recording = runner, True
        self.rows: list[Tensor] = []
        self._layers = [[(window, next(each)) for window in windows] for windows in layers]
        self._watched = {cell: i for i, cell in enumerate(runner.policy.watched)}
        self._queries: dict[int, Tensor] = {}

    def end(self) -> list[Tensor]:
        """What was made: `rows` of all windows, and the watched cells' latest queries. It is let go of, for a layer's
        checkpoint holds this, and would be held by it, a cycle."""
        made = [*self.rows, *(self._queries[i] for i in range(len(self._watched)))]
        self.recording, self.rows, self._queries = False, [], {}
        return made

    def __call__(self, layer: int, q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float) -> Tensor:
        if self.recording:
            self._watch(layer, q_HGTD.detach())
        windows = self._layers[layer]
        if len(windows) == 1:
            return self.see(*windows[0], q_HGTD, k_HTD, v_HTD, scale)
        out = torch.empty_like(q_HGTD)
        for window, given in windows:
            heads = self.runner.rows_of(window.heads)
            out[heads] = self.see(window, given, q_HGTD[heads], k_HTD[heads], v_HTD[heads], scale)
        return out

    @abstractmethod
    def see(
        self, window: Seen, given: tuple[Tensor, ...], q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float
    ) -> Tensor:
        """One window's attention. If this is recording, it adds keys, rotated keys and values to `rows`."""

    def watched(self, q_GTD: Tensor) -> Tensor:
        """Which of a watched cell's queries are handed out."""
        return q_GTD

    def _watch(self, layer: int, q_HGTD: Tensor) -> None:
        for head, q_GTD in enumerate(q_HGTD):
            if (i := self._watched.get(Cell(layer, head))) is not None:
                self._queries[i] = self.watched(q_GTD)


class Recorder:
    """Makes CUDA graphs of work, which do it again where it was done. Where there are none, the work is done anew.

    A backward pass runs where its forward pass did: all that is recorded, and a trial before it, is on one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = None if self._stream is None else torch.cuda.graph_pool_handle()

    @property
    def plays(self) -> bool:
        return self._stream is not None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Work within is on the stream that is recorded."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        if not self.plays:
            return work
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Other threads move blocks meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay
