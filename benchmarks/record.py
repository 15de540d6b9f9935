"""How a benchmark's figures are kept: one file a topic, one record a figure, with all it takes to repeat it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# Name, value, unit, target such as "<= 1.1", peer.
Figure = tuple[str, float, str, str | None, str | None]


def machine() -> str:
    """The GPU, or the CPU cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {psutil.cpu_count(logical=False)} cores"


def records(command: str, figures: Iterable[Figure], packages: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A record for each figure, of this machine and moment."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    common = {
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)},
        "command": command,
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }
    names = ("name", "value", "unit", "target", "peer")
    return [dict(zip(names, figure, strict=True)) | common for figure in figures]


def add(topic: str, records: Sequence[dict[str, Any]], folder: Path = RESULTS) -> None:
    """Put records into a topic's file, in place of those of the same names; the others stay."""
    path = folder / f"{topic}.json"
    known = {record["name"]: record for record in json.loads(path.read_text())} if path.exists() else {}
    known |= {record["name"]: record for record in records}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*known.values()], indent=1) + "\n")


def write(topic: str, records: Sequence[dict[str, Any]]) -> None:
    """Write a topic's file anew."""
    (RESULTS / f"{topic}.json").write_text(json.dumps(records, indent=1) + "\n")
