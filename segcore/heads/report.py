"""What the search found, as a small JSON file that the engine's settings take. No torch here."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segcore.config import Cell, SegmentConfig, SegmentedConfig
from segcore.errors import ConfigError

# Raised whenever the same settings would give other numbers.
METHOD = 1

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class HeadsReport:
    """Which cells select for a model, and what was measured of every cell; docs/heads.md has the method.

    Matrices are layers x KV heads, each value between 0 and 1, a mean over the questions.

    method: version of the method. model: as it was named. questions: how many were asked.
    haystack, templates, lengths (tokens), depths, rounds, seed: what the streams were made of.
    sink_tokens, tail_tokens: of both ends of a stream, never chosen. window_tokens, block_tokens: of the score.
    budgets: tokens chosen, for the recalls.
    selectors: the cells found, best first. readers: cells that read; None: all.
    selectors_reciprocal_rank: of the summed score of the first selector, the first two, and so on.
    selectors_recall: of all selectors together, by budget.
    reciprocal_rank: one over the rank of the needle's best block, by the cell's score alone.
    recall: share of the needle's tokens chosen by the cell's score alone, a matrix for each budget.
    retrieval_head: share of the answer's tokens at which the best query head of the cell attends most to the token
    that is copied (after arXiv 2404.15574).
    """

    method: int = METHOD
    model: str
    haystack: str
    templates: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    rounds: int
    seed: int
    questions: int
    sink_tokens: int
    tail_tokens: int
    window_tokens: int
    block_tokens: int
    budgets: tuple[int, ...]
    selectors: tuple[Cell, ...]
    readers: tuple[Cell, ...] | None = None
    selectors_reciprocal_rank: tuple[float, ...]
    selectors_recall: tuple[float, ...]
    reciprocal_rank: Matrix
    recall: tuple[Matrix, ...]
    retrieval_head: Matrix

    def __post_init__(self) -> None:
        if self.method != METHOD:
            raise ConfigError(f"method {self.method!r} of a heads report isn't this version's, {METHOD}: make it anew")
        layers, kv_heads = len(self.reciprocal_rank), len(self.reciprocal_rank[0]) if self.reciprocal_rank else 0
        for matrix in (self.reciprocal_rank, *self.recall, self.retrieval_head):
            if not kv_heads or len(matrix) != layers or {len(row) for row in matrix} != {kv_heads}:
                raise ConfigError("the matrices of a heads report must have one shape, layers x KV heads")
        if not len(self.recall) == len(self.selectors_recall) == len(self.budgets):
            raise ConfigError("a heads report must have one recall for each budget")
        for cell in (*self.selectors, *(self.readers or ())):
            if not (0 <= cell.layer < layers and 0 <= cell.kv_head < kv_heads):
                raise ConfigError(f"cell {tuple(cell)} isn't among the report's {layers} layers of {kv_heads} KV heads")

    def apply(self, segment: SegmentConfig) -> SegmentedConfig:
        """The settings with this report's selectors and readers. Raises ConfigError for another policy's."""
        if not isinstance(segment, SegmentedConfig) or segment.selection != "global":
            raise ConfigError("a heads report names the cells of policy 'segmented' with selection 'global' alone")
        return dataclasses.replace(segment, selectors=self.selectors, readers=self.readers)

    def write(self, path: Path) -> None:
        """Write the file, a line for each field."""
        lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in dataclasses.asdict(self).items())
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def read(cls, path: Path) -> HeadsReport:
        """Read a file. Raises ConfigError that names the file for anything unknown, missing or out of shape."""
        try:
            return cls._of(json.loads(path.read_text(encoding="utf-8")))
        except ConfigError as error:
            raise ConfigError(f"{path.name}: {error.message}") from error
        except (OSError, TypeError, ValueError) as error:
            raise ConfigError(f"{path.name} isn't a readable heads report: {error}") from error

    @classmethod
    def _of(cls, values: Any) -> HeadsReport:
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            odd = sorted(names ^ set(values)) if isinstance(values, dict) else ["a table of fields"]
            raise ConfigError(f"unknown or missing in a heads report: {', '.join(odd)}")
        cells = {
            name: None if name == "readers" and values[name] is None else tuple(_cell(pair) for pair in values[name])
            for name in ("selectors", "readers")
        }
        return cls(**({name: _frozen(value) for name, value in values.items()} | cells))


def _cell(pair: Any) -> Cell:
    layer, kv_head = pair
    if type(layer) is not int or type(kv_head) is not int:
        raise ConfigError(f"{pair!r} isn't a cell: a cell is a pair of whole numbers, (layer, KV head)")
    return Cell(layer, kv_head)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
