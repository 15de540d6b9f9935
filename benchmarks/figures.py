"""Print every figure of benchmarks/results beside its target."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
MARKS = {True: "met", False: "MISSED", None: ""}


def met(value: float, target: str | None) -> bool | None:
    """Whether a value meets a target such as "<= 1.1"; None if there is no target."""
    if not target:
        return None
    sign, bound = target.split()
    return value <= float(bound) if sign == "<=" else value >= float(bound)


def run() -> int:
    table = Table("topic", "figure", "value", "unit", "target", "", "peer", "date")
    for path in sorted(RESULTS.glob("*.json")):
        for row in json.loads(path.read_text()):
            verdict = MARKS[met(row["value"], row["target"])]
            value = f"{row['value']:,.4g}"
            table.add_row(
                path.stem, row["name"], value, row["unit"], row["target"] or "", verdict, row["peer"] or "", row["date"]
            )
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(run())
