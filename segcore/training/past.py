"""The past of a stream that is run twice: what was chosen in the first run is repeated in the second."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from segcore.pastkv.base import PastLayout
from segcore.pastkv.journal import root_key
from segcore.pastkv.manager import PastKVManager
from segcore.pastkv.session import SessionPast


class RecordedPast(SessionPast):
    """Remembers every decision, in host memory. As with the journal's events, one is new, or happened here before."""

    def __init__(self, manager: PastKVManager, layout: PastLayout | None) -> None:
        super().__init__(manager, layout, root_key("", "training"))
        self._decisions: list[Tensor] = []
        self._next = 0

    @property
    def decided(self) -> int:
        """Decisions so far, for `rewind`."""
        return self._next

    def rewind(self, decided: int) -> None:
        """The stream runs again from where so many decisions had been taken."""
        assert decided <= len(self._decisions)
        self._next = decided

    def decide(self, choose: Callable[[], Tensor]) -> Tensor:
        if self._next == len(self._decisions):
            with torch.no_grad():
                self._decisions.append(choose().cpu())
        self._next += 1
        return self._decisions[self._next - 1]
