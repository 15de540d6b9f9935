"""Activation checkpointing: a layer keeps its input alone, and runs again in the backward pass.

What runs again is pure: a pass's attention repeats what it saw (`engine.runner`), and choices, closes and past KV lie
between passes, never inside a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Graphs that are built inside keep the layers' inputs alone. There is no dropout whose state would matter."""
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
