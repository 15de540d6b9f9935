"""Learned gates of policy `duo` as a small JSON file that the engine's settings take. No torch here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segcore.config import Cell, DuoConfig, SegmentConfig
from segcore.errors import ConfigError
from segcore.heads.report import HeadsReport, Matrix


@dataclass(frozen=True, kw_only=True)
class GatesReport:
    """Which cells of a model must see everything, and the gates that say so, layers x KV heads, from 0 to 1.

    model: as it was named. sink_tokens, window_tokens, segment_tokens: what the other cells saw. steps: of training.
    share: of all cells. retrieval: that many, those with the largest gates; ties go to the earlier cell.
    """

    model: str
    sink_tokens: int
    window_tokens: int
    segment_tokens: int
    steps: int
    share: float
    retrieval: tuple[Cell, ...]
    gates: Matrix

    @classmethod
    def of(
        cls, gates: Sequence[Sequence[float]], config: DuoConfig, *, model: str, share: float, steps: int
    ) -> GatesReport:
        """Cut at a share. Raises ConfigError for one that leaves no cell, or isn't one."""
        cells = [(-gate, Cell(layer, head)) for layer, row in enumerate(gates) for head, gate in enumerate(row)]
        count = round(share * len(cells))
        if not 1 <= count <= len(cells):
            raise ConfigError(f"share={share} of {len(cells)} cells must leave at least one, and be at most 1")
        return cls(
            model=model,
            sink_tokens=config.sink_tokens,
            window_tokens=config.window_tokens,
            segment_tokens=config.segment_tokens,
            steps=steps,
            share=share,
            retrieval=tuple(sorted(cell for _, cell in sorted(cells)[:count])),
            gates=tuple(tuple(row) for row in gates),
        )

    def apply(self, segment: SegmentConfig) -> DuoConfig:
        """The settings with this report's retrieval cells. Raises ConfigError for another policy's."""
        if not isinstance(segment, DuoConfig):
            raise ConfigError("a gates report names the cells of policy 'duo' alone")
        return dataclasses.replace(segment, retrieval=self.retrieval)

    def write(self, path: Path) -> None:
        """Write the file, a line for each field."""
        lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in dataclasses.asdict(self).items())
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def read(cls, path: Path) -> GatesReport:
        """Read a file. Raises ConfigError that names the file for anything unknown, missing or out of shape."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["retrieval"] = tuple(Cell(*map(int, pair)) for pair in values["retrieval"])
            values["gates"] = tuple(tuple(map(float, row)) for row in values["gates"])
            return cls(**values)
        except (OSError, TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"{path.name} isn't a readable gates report: {error}") from error


def read_report(path: Path) -> HeadsReport | GatesReport:
    """What a file reports: selectors, or gates. Raises ConfigError."""
    try:
        gates = "gates" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        gates = False
    return GatesReport.read(path) if gates else HeadsReport.read(path)
