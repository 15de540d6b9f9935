"""How much of what the oracle chooses an index finds, measured while it serves: at one search of so many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# One search of so many is made twice, the second time over every key.
EVERY = 64


@dataclass
class Recall:
    """Tokens that the oracle chose in the searches that were looked at, and those of them that the index found.

    Counted where the search is, so that nobody waits for a device; `counts` does.
    """

    searches: int = 0
    _chosen: int = 0
    _found: Tensor | None = None

    def due(self) -> bool:
        """Count a search; whether it is to be looked at."""
        self.searches += 1
        return self.searches % EVERY == 1

    def look(self, found_R: Tensor, oracle_R: Tensor) -> None:
        """Compare what the index found with what the oracle chooses."""
        self._chosen += len(oracle_R)
        found = torch.isin(oracle_R, found_R).sum()
        self._found = found if self._found is None else self._found + found

    @property
    def counts(self) -> dict[str, int]:
        """Tokens that were "index.chosen" by the oracle, and "index.found"."""
        return {"index.chosen": self._chosen, "index.found": 0 if self._found is None else int(self._found)}
