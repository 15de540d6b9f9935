"""The quality study's figures, of what `segcore study` has told: `python -m benchmarks.quality studies/quality`.

Scores are in percent, of as many items as there are; the perplexity is that of positions 4,096 to 8,191, divided by the
full arm's. Each item's score, by where its fact stands, goes to results/raw/quality.json, of which
`python -m benchmarks.quality_picture` makes docs/quality.png. Figures bear the machine's name: run it where the study
ran, or say which that was.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, Figure, add, records

# Each figure's name, its task, the lengths whose mean it is, and its target.
SCORES = (
    ("single_8k", "single", (8000,), ">= 98"),
    ("single_32k", "single-32k", (32000,), ">= 98"),
    ("single_128k", "single-128k", (128000,), ">= 98"),
    ("single_1m", "single-1m", (1000000,), ">= 95"),
    ("mk8_8k", "mk8", (8000,), ">= 90"),
    ("mk8_32k", "mk8-32k", (32000,), ">= 90"),
    ("mk8_128k", "mk8-128k", (128000,), ">= 85"),
    ("mk8_1m", "mk8-1m", (1000000,), None),
    ("kv_32k", "kv-32k", (32000,), ">= 90"),
    ("unseen_8k", "unseen", (3500, 7900), ">= 75"),
    ("unseen_32k", "unseen-32k", (32000,), ">= 65"),
    ("squad_8k", "squad", (8000,), None),
)
FROM = "4096"

# What a study tells of an arm: a cell by task and length.
Cells = dict[tuple[str, int], dict[str, Any]]


def figures(told: dict[str, Any], arm: str, control: str) -> Iterator[Figure]:
    """What is there of an arm, and of others that go on with it, beside the control's. told: a study.json."""
    ours, theirs = cells_of(told, arm), cells_of(told, control)
    for name, task, lengths, target in SCORES:
        if all((task, length) in ours for length in lengths):
            other = mean(theirs, task, lengths) if all((task, length) in theirs for length in lengths) else None
            items = sum(ours[task, length]["score"]["items"] for length in lengths)
            peer = None if other is None else f"{control}: {other:.1f}"
            yield name, mean(ours, task, lengths), f"% of {items} items", target, peer
    if ("ppl", 8000) in ours and ("ppl", 8000) in theirs:
        nats = [cells["ppl", 8000]["nats"][FROM] for cells in (ours, theirs)]
        yield (
            "ppl_ratio",
            math.exp(nats[0] - nats[1]),
            f"of {control}'s",
            "<= 1.12",
            f"{control}: {math.exp(nats[1]):.2f}",
        )


def cells_of(told: dict[str, Any], arm: str) -> Cells:
    """Of an arm, and of "ARM-more" and "ARM-million"."""
    names = [arm, f"{arm}-more", f"{arm}-million"]
    cells = [cell for name in names for cell in told.get(name, {}).get("cells", ())]
    return {(cell["task"], cell["length"]): cell for cell in cells if cell["score"] is not None}


def mean(cells: Cells, task: str, lengths: tuple[int, ...]) -> float:
    """In percent."""
    return 100 * sum(cells[task, length]["score"]["mean"] for length in lengths) / len(lengths)


def by_depth(study: Path, arms: Sequence[str]) -> dict[str, list[tuple[str, int, float, float]]]:
    """Of each arm's needles: task, length, where the fact stands, score."""
    found: dict[str, list[tuple[str, int, float, float]]] = {arm: [] for arm in arms}
    for file in sorted(study.glob("evaluations/*/results.jsonl")):
        for line in file.read_text().splitlines():
            item = json.loads(line)
            if item["arm"] in found and "depth" in item.get("facts", ()):
                depth = round(item["facts"]["depth"], 3)
                found[item["arm"]].append((item["task"], item["length"], depth, item["score"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    parser.add_argument("study", type=Path, help="the study's folder")
    parser.add_argument("--arm", default="mismatch")
    parser.add_argument("--control", default="full")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--machine", help="where the study ran, if elsewhere")
    parser.add_argument("--torch", help="its version of torch")
    options = parser.parse_args()
    told = json.loads((options.study / "study.json").read_text())
    command = f"segcore study examples/study/quality.yaml, arm {options.arm}"
    made = records(command, figures(told, options.arm, options.control))
    if options.machine:
        made = [record | {"machine": options.machine} for record in made]
    if options.torch:
        made = [record | {"versions": record["versions"] | {"torch": options.torch}} for record in made]
    for record in made:
        print(f"{record['name']:12} {record['value']:7.2f} {record['unit']} ({record['target']}; {record['peer']})")
    add("quality", made, options.results)
    raw = options.results / "raw" / "quality.json"
    raw.parent.mkdir(exist_ok=True)
    raw.write_text(json.dumps(by_depth(options.study, (options.control, options.arm))) + "\n")


if __name__ == "__main__":
    main()
