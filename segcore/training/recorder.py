"""CUDA graphs of a trainer's work, and the gradients of parameters that such work leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class GradientSums:
    """Gradients of a model's parameters, summed where graphs find them, in fp32 at least."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        wide = [torch.promote_types(p.dtype, torch.float32) for p in self.parameters]
        self._sums = [torch.zeros_like(p, dtype=dtype) for p, dtype in zip(self.parameters, wide, strict=True)]

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
