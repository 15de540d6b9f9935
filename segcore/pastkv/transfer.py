"""From the device to host memory, in the background: a close doesn't wait for copies, nor the device for the close."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

import torch
from torch import Tensor

from segcore.pastkv.base import Block

# Blocks on their way at once; each is in the device's memory until it has arrived.
IN_FLIGHT = 2


class Transfer:
    """Moves blocks to host memory on a stream and a thread of its own. On a CPU there is nothing to move.

    They go through one pinned buffer: pinning memory anew for each would hold up the device's own work, seven of ten
    milliseconds of a large model's prefill (docs/lab-log.md).
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = torch.empty(0, dtype=torch.uint8)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="segcore-mover")
        self._moving: deque[Future[None]] = deque()

    def start(self, find: Callable[[], Block | None], arrived: Callable[[Block], None]) -> None:
        """Copy a block; `arrived` gets the copy, on another thread. Waits while IN_FLIGHT are on their way.

        find: the block as it is when its turn comes; None: it isn't wanted any more.
        """
        if self._stream is None:
            self._move(find, arrived)
            return
        while len(self._moving) >= IN_FLIGHT:
            self._moving.popleft().result()
        made = torch.cuda.Event()
        made.record()
        self._moving.append(self._mover.submit(self._copy, self._stream, made, find, arrived))

    def settle(self) -> None:
        """Wait for what is on its way."""
        wait(self._moving)

    def close(self) -> None:
        self._mover.shutdown(wait=True)

    def _copy(
        self,
        stream: torch.cuda.Stream,
        made: torch.cuda.Event,
        find: Callable[[], Block | None],
        arrived: Callable[[Block], None],
    ) -> None:
        with torch.cuda.stream(stream):
            stream.wait_event(made)
            self._move(find, arrived)

    def _move(self, find: Callable[[], Block | None], arrived: Callable[[Block], None]) -> None:
        block = find()
        if block is None:
            return
        kv_SC2D = self._to_host(block.kv_SC2D)
        boundary = {name: self._to_host(tensor) for name, tensor in block.boundary.items()}
        arrived(replace(block, kv_SC2D=kv_SC2D, boundary=boundary))

    def _to_host(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor
        assert self._stream is not None
        if self._pinned.nbytes < tensor.nbytes:
            self._pinned = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
        staged = self._pinned[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        staged.copy_(tensor, non_blocking=True)
        self._stream.synchronize()
        return staged.clone()
