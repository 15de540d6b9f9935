"""How much memory the engine takes, past KV apart."""

from __future__ import annotations

import psutil
import torch


def engine_bytes(device: torch.device, past_host_bytes: int) -> int:
    """Bytes that should not grow with the stream: weights, states and scratch.

    On a GPU: what torch holds there. On a CPU: the process's resident memory without the past KV in it.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss) - past_host_bytes
