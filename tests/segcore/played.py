"""Recordings that are played on a CPU as CUDA graphs are: the same kernels again, on and into the same tensors.

What work reads from Python, sizes, positions and branches, is as it was when it was recorded, and nobody may wait for
a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segcore.training.recorder import Recorder

aten = torch.ops.aten
# The host would wait for these, which a capture forbids.
_WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.unique_dim, aten._unique2}


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in _WAITING, f"{func} can't be recorded"
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, _tensors(made)))
        return made

    @torch.no_grad()
    def play(self) -> None:
        for func, args, kwargs, made in self._calls:
            given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
            fresh = [x.untyped_storage().data_ptr() not in given for x in made]
            if not any(fresh) and not func._schema.is_mutable:
                continue  # a view is where it was
            for old, new, is_fresh in zip(made, _tensors(func(*args, **kwargs)), fresh, strict=True):
                if is_fresh:
                    old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def play_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on."""

    def record(_: Recorder, work: Callable[[], None]) -> Callable[[], None]:
        with _Tape() as tape:
            work()
        return tape.play

    monkeypatch.setattr(Recorder, "__call__", record)
    monkeypatch.setattr(Recorder, "plays", True)
