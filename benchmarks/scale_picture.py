"""docs/scale.png: what sessions cost, where the simulation breaks, and how far it is from a real service.

python -m benchmarks.scale_picture          # after scale_check, whose raw figures it reads; some minutes
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch

from benchmarks.record import RESULTS, ROOT
from benchmarks.scale_sim import Load, Simulation, Site, quantile
from segcore.memory import lines, total
from services.memory import SHAPES, engine_config

MODEL, SEGMENT, TOKENS = "llama-3.1-8b", "segment_tokens=4096,selectors=[[0,0],[0,1]]", 100_000
SESSIONS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
A_REPLICA = [15, 30, 60, 90, 120, 150, 180, 210, 240]
SEEDS = 40


def draw_cost(axes: Any) -> None:
    """Of one engine; a service's are those of its engines, added up."""
    config, shape = engine_config(MODEL, SEGMENT), SHAPES[MODEL]
    made = lines(shape.spec(torch.bfloat16), shape.parameters, config, TOKENS)
    for place in ("device", "host", "disk"):
        sizes = [total(made, config, sessions=count, tokens=TOKENS)[place] / 2**30 for count in SESSIONS]
        axes.plot(SESSIONS, sizes, marker=".", label=place)
    axes.set(xscale="log", yscale="log", xlabel="sessions of 100K tokens on one engine", ylabel="GiB")
    axes.set_title("Llama-3.1-8B, by the formulas")


def draw_load(axes: Any) -> None:
    site = Site(replicas=10, mtbf_s=1e12)
    for pause in (30, 120, 600):
        waits = [
            quantile(Simulation(site, Load(sessions=10 * each, pause_s=pause, hours=1)).run().first_s, 0.99)
            for each in A_REPLICA
        ]
        axes.plot(A_REPLICA, waits, marker=".", label=f"a question every {pause} s")
    axes.axhline(5, color="grey", linewidth=0.8)
    axes.set(yscale="log", xlabel="sessions a replica (of 10)", ylabel="seconds to the first token, 99 of 100")
    axes.set_title("Simulated: where it breaks")


def draw_failures(axes: Any) -> None:
    replicas = [10, 30, 100, 300]
    for store in (10, 40, 400):
        waits = []
        for count in replicas:
            site = Site(replicas=count, store_bytes_s=store * 1e9)
            waits.append(quantile(Simulation(site, Load(sessions=30 * count, fails=0.1)).run().recovery_s, 0.99))
        axes.plot(replicas, waits, marker=".", label=f"store of {store} GB/s")
    axes.set(xscale="log", ylim=(0, None), xlabel="replicas, of which a tenth fails", ylabel="seconds, 99 of 100")
    axes.set_title("Simulated: a question after a move")


def draw_check(axes: Any) -> None:
    for tier, color in (("read", "C0"), ("rerun", "C1")):
        raw = json.loads((RESULTS / "raw" / f"scale_check_{tier}.json").read_text())
        site, load = Site(**raw["site"]), Load(**raw["load"])
        found = [Simulation(site, load, seed).run() for seed in range(SEEDS)]
        for name, style in (("first_s", ":"), ("recovery_s", "-")):
            what = f"{tier}: {'undisturbed' if name == 'first_s' else 'after a move'}"
            steps(axes, raw["measured"][name], color=color, linestyle=style, label=what)
            pooled = [value for out in found for value in getattr(out, name)]
            steps(axes, pooled, color=color, linestyle=style, alpha=0.35, linewidth=3)
    axes.set(xscale="log", xlabel="seconds to the first token", ylabel="share of questions")
    axes.set_title("Three real engines (thin), simulated (wide)")


def steps(axes: Any, values: Sequence[float], **style: Any) -> None:
    """The share of values up to each."""
    ordered = sorted(values)
    axes.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], where="post", **style)


def main() -> None:
    figure, places = plt.subplots(2, 2, figsize=(11, 7.4))
    for draw, axes in zip((draw_cost, draw_load, draw_failures, draw_check), places.flat, strict=True):
        draw(axes)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "scale.png", dpi=110)


if __name__ == "__main__":
    main()
