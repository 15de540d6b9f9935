"""How a benchmark's figures are kept: one file a topic, one record a figure, with all it takes to repeat it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

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


def write(topic: str, command: str, figures: Sequence[Figure], packages: Sequence[str] = ()) -> Path:
    """Write a topic's file anew; returns its path."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    common = {
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)},
        "command": command,
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }
    records = [
        {"name": name, "value": value, "unit": unit, "target": target, "peer": peer, **common}
        for name, value, unit, target, peer in figures
    ]
    path = RESULTS / f"{topic}.json"
    path.write_text(json.dumps(records, indent=1) + "\n")
    return path
