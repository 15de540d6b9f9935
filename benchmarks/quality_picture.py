"""Draw docs/quality.png from results/raw/quality.json: percent right, by where the fact stands. Needs matplotlib."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.record import RESULTS, ROOT

# Rows of the picture, and the tasks that each is made of.
KINDS = {"one key": "single", "eight keys": "mk8", "unseen forms": "unseen"}
PARTS = 5


def grid(axes: Axes, columns: dict[str, list[list[float]]], title: str) -> None:
    """columns: scores of each fifth of the depth, by length."""
    means = np.array([[np.mean(part) if part else np.nan for part in column] for column in columns.values()]).T
    axes.imshow(means, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for (row, column), mean in np.ndenumerate(means):
        axes.text(column, row, "" if np.isnan(mean) else f"{100 * mean:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), list(columns), fontsize=8)
    axes.set_yticks(range(PARTS), [f"{100 * i // PARTS}-{100 * (i + 1) // PARTS}%" for i in range(PARTS)], fontsize=8)
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(length=0)


def main() -> None:
    items = json.loads((RESULTS / "raw" / "quality.json").read_text())
    figure, axes = plt.subplots(len(items), len(KINDS), figsize=(9, 2.6 * len(items)), constrained_layout=True)
    for row, (arm, found) in zip(axes, items.items(), strict=True):
        for where, (kind, task) in zip(row, KINDS.items(), strict=True):
            columns: dict[str, list[list[float]]] = {}
            for name, length, depth, score in sorted(found, key=lambda item: item[1]):
                if name.split("-")[0] == task:
                    parts = columns.setdefault(f"{length:,}", [[] for _ in range(PARTS)])
                    parts[min(int(depth * PARTS), PARTS - 1)].append(score)
            grid(where, columns, f"{arm}: {kind}")
        row[0].set_ylabel("where the fact stands", fontsize=8)
    figure.savefig(ROOT / "docs" / "quality.png", dpi=110)


if __name__ == "__main__":
    main()
