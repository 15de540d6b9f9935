"""Draw docs/gpu.png from results/raw/gpu.json: peak memory and prefill, by the stream's length. Needs matplotlib."""

from __future__ import annotations

import json
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.record import RESULTS, ROOT

NAMES = {"llama2_7b": "Llama-2-7B", "llama31_8b": "Llama-3.1-8B", "smollm2": "SmolLM2-135M"}
PEER_TOKENS = 131072


def lines(axes: Axes, runs: dict[str, Any], ours: Any, peers: dict[str, Any]) -> None:
    """A line for each shape, and what the peers took at their one length."""
    for (shape, run), colour in zip(runs.items(), ("#1f77b4", "#d62728", "#2ca02c"), strict=False):
        lengths = sorted(map(int, run["ours"]["prefill_s"]))
        axes.plot(lengths, [ours(run["ours"], n) for n in lengths], "o-", color=colour, label=NAMES[shape])
        for marker, value in peers.items():
            axes.plot([PEER_TOKENS], [value(run["peer"])], marker, color=colour, fillstyle="none")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = (8192, 65536, PEER_TOKENS, 1048576)
    axes.set_xticks(ticks, [f"{n // 1024}K" for n in ticks[:-1]] + ["1M"])
    axes.set_xlabel("tokens of the stream")
    axes.grid(alpha=0.3)


def main() -> None:
    runs = json.loads((RESULTS / "raw" / "gpu.json").read_text())
    runs = {shape: runs[shape] for shape in NAMES if shape in runs}
    figure, (memory, rate) = plt.subplots(1, 2, figsize=(11, 4.2))
    peers = {"s": lambda peer: peer["peak_gib"], "D": lambda peer: peer["chunked_peak_gib"]}
    lines(memory, runs, lambda run, n: run["peak_gib"][str(n)], peers)
    memory.set_ylabel("peak GPU memory, GiB")
    memory.plot([], [], "ks", fillstyle="none", label="full attention")
    memory.plot([], [], "kD", fillstyle="none", label="full attention, in chunks")
    memory.legend(fontsize=8)
    peers = {
        "s": lambda peer: PEER_TOKENS / peer["prefill_s"],
        "D": lambda peer: PEER_TOKENS / peer["chunked_prefill_s"],
    }
    lines(rate, runs, lambda run, n: n / run["prefill_s"][str(n)], peers)
    rate.set_ylabel("prefill, tokens/s")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "gpu.png", dpi=110)


if __name__ == "__main__":
    main()
