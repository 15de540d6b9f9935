"""From the device to host memory, in the background: a close doesn't wait for copies, nor the device for the close."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from segcore.pinned import pinned_memory

log = logging.getLogger(__name__)
Tensors = dict[str, Tensor]


class Transfer:
    """Moves tensors to pinned host memory on a stream and a thread of its own. On a CPU there is nothing to move."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="segcore-mover")
        self._moving: list[Future[None]] = []

    def start(self, tensors: Tensors, arrived: Callable[[Tensors], None]) -> None:
        """Copy tensors; `arrived` gets the copies, on another thread, in the order of the calls.

        The caller gives them up: they stay on the device, as they are, until they have arrived.
        """
        if self._stream is None:
            arrived(tensors)
            return
        copies = {name: _room_for(tensor) if tensor.is_cuda else tensor for name, tensor in tensors.items()}
        made = torch.cuda.Event()
        made.record()  # behind whatever used the copies' memory before
        self._moving = [moving for moving in self._moving if not moving.done()]
        self._moving.append(self._mover.submit(self._copy, self._stream, made, tensors, copies, arrived))

    def settle(self) -> None:
        """Wait for what is on its way."""
        wait(self._moving)

    def close(self) -> None:
        self._mover.shutdown(wait=True)

    @staticmethod
    def _copy(
        stream: torch.cuda.Stream,
        made: torch.cuda.Event,
        tensors: Tensors,
        copies: Tensors,
        arrived: Callable[[Tensors], None],
    ) -> None:
        try:
            # What an engine's thread makes may be written in its mode only.
            with torch.inference_mode(), torch.cuda.stream(stream):
                stream.wait_event(made)
                for name, copy in copies.items():
                    if copy is not tensors[name]:
                        copy.copy_(tensors[name], non_blocking=True)
                stream.synchronize()
            arrived(copies)
        except Exception:
            log.exception("a block stays on the device: its copy to host memory failed")


def _room_for(tensor: Tensor) -> Tensor:
    return pinned_memory().take(tuple(tensor.shape), tensor.dtype)
