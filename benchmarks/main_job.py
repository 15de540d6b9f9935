"""The main job on this machine: 100,000 tokens streamed in over gRPC, a question, an answer.

.venv/bin/python -m benchmarks.main_job          # writes benchmarks/results/main_job.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data import topics

from benchmarks.record import ROOT, Figure, records, write

COMMAND = "-m benchmarks.main_job"
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


def figures_of(figures: dict) -> list[Figure]:
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
    return [(name, value, unit, target, None) for name, value, unit, target in values]


if __name__ == "__main__":
    write("main_job", records(COMMAND, figures_of(measure()), ("ray", "grpcio")))
