"""What selectors look for, learned apart from what their cells attend to.

Of the score q . k a selector may learn any bilinear form, (q + q A) . k, by a map of its queries alone: one for each of
its query heads, at first none. Keys and their index stay as they are, no gradient reaches the model, and the cells go
on attending, and copying, as they did. The selectors of SmolLM2-135M learn 12,288 numbers each.

Shapes: C selectors, G query heads of a selector, W tokens of the query window, D head dimension.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from segcore.config import Cell
from segcore.errors import ConfigError
from segcore.model import ModelSpec


class QueryMaps(nn.Module):
    """Maps of the query windows of some cells, which are the selectors, in fp32 at least."""

    def __init__(self, cells: Iterable[Cell], spec: ModelSpec) -> None:
        super().__init__()
        self.cells = tuple(sorted(Cell(*cell) for cell in cells))
        shape = (len(self.cells), spec.queries_per_kv_head, spec.head_dim, spec.head_dim)
        wide = torch.promote_types(spec.dtype, torch.float32)
        self.change_CGDD = nn.Parameter(torch.zeros(shape, dtype=wide, device=spec.device))

    def forward(self, queries_CGWD: Sequence[Tensor]) -> list[Tensor]:
        """The windows to score by, one per selector."""
        wide = (queries.to(self.change_CGDD.dtype) for queries in queries_CGWD)
        return [q_GWD + q_GWD @ change_GDD for q_GWD, change_GDD in zip(wide, self.change_CGDD, strict=True)]

    def check(self, selectors: tuple[Cell, ...]) -> None:
        """Raise ConfigError if these aren't the cells whose queries are mapped."""
        if selectors != self.cells:
            raise ConfigError(
                f"the selectors {[tuple(c) for c in selectors]} aren't those that were trained,"
                f" {[tuple(c) for c in self.cells]}: leave selectors to the adapter, or serve without it"
            )

    def write(self, path: Path) -> None:
        """Write the file that `read` reads."""
        cells = json.dumps([list(cell) for cell in self.cells])
        save_file({"change_CGDD": self.change_CGDD.detach().cpu()}, path, metadata={"cells": cells})

    @classmethod
    def read(cls, path: Path, spec: ModelSpec) -> QueryMaps:
        """The maps of a file, for a model. Raises ConfigError for what isn't one, or not one of such a model."""
        try:
            with safe_open(path, framework="pt") as file:
                maps = cls([Cell(*pair) for pair in json.loads(file.metadata()["cells"])], spec)
                change_CGDD = file.get_tensor("change_CGDD")
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} holds no maps of queries: {error}") from error
        if change_CGDD.shape != maps.change_CGDD.shape:
            raise ConfigError(
                f"{path} is for another model: its maps are {list(change_CGDD.shape)}, and {spec.architecture} takes"
                f" {list(maps.change_CGDD.shape)}; load its own model"
            )
        maps.change_CGDD.data.copy_(change_CGDD)
        return maps
