"""The main job on this machine: 100,000 tokens streamed in over gRPC, a question, an answer.

.venv/bin/python benchmarks/main_job.py          # writes benchmarks/results/main_job.json
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data import topics

import psutil

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "main_job.json"
COMMAND = "benchmarks/main_job.py"
BYTES = 412_000
QUESTION = "What is the assert statement used for?"


def measure() -> dict:
    """Run `segcore ask` as a user does; returns its figures."""
    with tempfile.TemporaryDirectory() as folder:
        document, figures = Path(folder) / "document.txt", Path(folder) / "figures.json"
        document.write_text("\n\n".join(topics.topics.values())[:BYTES])
        ask = [sys.executable, "-m", "services.cli", "ask", str(document), QUESTION]
        subprocess.run([*ask, "--max-tokens", "64", "--figures", str(figures)], check=True, cwd=ROOT)
        return json.loads(figures.read_text())


def rows(figures: dict) -> list[dict]:
    early = next(size for segments, size in figures["memory"] if segments >= 2)
    late, answer = figures["memory"][-1][1], figures["answers"][0]
    past_per_token = figures["past_disk_bytes"] / (figures["segments"] * 1024)
    values = [
        ("document_tokens", figures["tokens"], "tokens", ">= 100000"),
        ("engine_memory_growth_100k", late / early, "ratio to after two segments", "<= 1.1"),
        ("engine_memory_100k", late / 2**20, "MiB", None),
        ("past_kv_bytes_per_token", past_per_token, "bytes on disk", None),
        ("prefill_rate_100k", figures["tokens"] / figures["upload_seconds"], "tokens/s", None),
        ("first_token_after_last_byte", answer["first_token_seconds"], "s", None),
        ("decode_rate_100k", answer["tokens_per_second"], "tokens/s", None),
    ]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "ray", "grpcio")}
    common = {
        "peer": None,
        "machine": f"{platform.machine()} CPU, {psutil.cpu_count(logical=False)} cores",
        "versions": versions,
        "command": COMMAND,
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }
    return [{"name": n, "value": v, "unit": u, "target": t, **common} for n, v, u, t in values]


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(rows(measure()), indent=1) + "\n")
    print(RESULTS.read_text())
