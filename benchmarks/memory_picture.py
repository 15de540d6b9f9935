"""Draw docs/memory.png from the formulas: bytes of one session of the default model, by place. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from segcore.config import CacheConfig, EngineConfig, segment_config
from segcore.memory import Part, lines, total
from segcore.presets import DEFAULT_MODEL, model_segment
from services.memory import SHAPES

TARGET = Path(__file__).parent.parent / "docs" / "memory.png"
LENGTHS = [round(2 ** (n / 8)) for n in range(80, 185)]
UNBOUNDED = CacheConfig(host_bytes=2**50, directory=TARGET.parent)
STATE: set[Part] = {"state", "past", "journal"}


def curve(policy: str, place: str) -> list[float]:
    """GiB of a session in its slot, without weights and scratch."""
    shape, segment = SHAPES[DEFAULT_MODEL], model_segment(DEFAULT_MODEL, {}, adapter="default")
    config = EngineConfig(segment=segment if policy == "segmented" else segment_config(policy), cache=UNBOUNDED)
    sizes = []
    for tokens in LENGTHS:
        made = [m for m in lines(shape.spec(torch.bfloat16), 0, config, tokens) if m.part in STATE]
        sizes.append(total(made, config, sessions=1, tokens=tokens)[place] / 2**30)  # type: ignore[index]
    return sizes


def main() -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(LENGTHS, curve("full", "device"), "--", color="tab:red", label="full: device")
    axes.plot(LENGTHS, curve("segmented", "device"), color="tab:blue", label="segmented: device")
    axes.plot(LENGTHS, curve("segmented", "disk"), ":", color="tab:gray", label="segmented: past KV, host or disk")
    axes.set(xscale="log", yscale="log", ylim=(0.01, 1000), xlabel="tokens of the stream", ylabel="GiB of one session")
    axes.axvline(SHAPES[DEFAULT_MODEL].max_positions, color="0.7", linewidth=0.8)
    axes.annotate("the model's positions", (SHAPES[DEFAULT_MODEL].max_positions * 1.1, 0.011), color="0.4")
    axes.set_title("SmolLM2-135M, bfloat16, by formula (room that grows doubles)", loc="left")
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(TARGET, dpi=150)


if __name__ == "__main__":
    main()
