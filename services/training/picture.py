"""A run in one picture: the loss by step, and what evaluation found before, between and after."""

from __future__ import annotations

from pathlib import Path

from services.training.metrics import LINES, read_lines

PICTURE = "curve.png"


def draw(run: Path) -> Path:
    """Draw a run's metrics, from the lines in its folder; returns the picture's path."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    lines = read_lines(run / LINES)
    figure = Figure(figsize=(9, 4), layout="constrained")
    answered = [line for line in lines if "eval_accuracy" in line]
    axes = figure.subplots(1, 2 if answered else 1, squeeze=False)[0]
    for key, style, label in (("loss", "0.6", "training"), ("eval_loss", "C0o-", "evaluation")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        axes[0].plot(*zip(*points, strict=True), style, label=label)
    axes[0].set(title=f"{run.name}: loss", xlabel="step", ylabel="nats per target")
    axes[0].legend()
    if answered:
        steps, shares = [line["step"] for line in answered], [line["eval_accuracy"] for line in answered]
        axes[1].plot(steps, shares, "o-")
        for at in (0, -1):
            axes[1].annotate(
                f"{shares[at]:.0%}", (steps[at], shares[at]), textcoords="offset points", xytext=(0, 8), ha="center"
            )
        axes[1].set(title="answers right", xlabel="step", ylim=(-0.05, 1.15))
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.savefig(run / PICTURE, dpi=120)
    return run / PICTURE
