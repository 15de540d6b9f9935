"""The report's pictures: curves by length, and needles' grids of length by depth; SVG, to stand in the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from segcore.errors import ConfigError
from services.evaluation.measures import SHARE
from services.evaluation.summary import FIGURES, Interval, Summary

COLOURS = ("#1b5e8c", "#d1495b", "#3f7d20", "#8e5aa8", "#b5830f", "#4d5663", "#00798c", "#a23b16")


def colour(summary: Summary, arm: str) -> str:
    return COLOURS[summary.arms.index(arm) % len(COLOURS)]


def curves(summary: Summary, task: str) -> str:
    """Scores by length, with their intervals."""
    figure, axes = _figure(4.6, 2.7)
    lengths, measure = summary.lengths(task), summary.measure(task)
    for i, arm in enumerate(summary.arms):
        found = [(n, s) for n in lengths if (s := summary.score(task=task, length=n, arm=arm)) is not None]
        if found:
            shown = [(n, [measure.value(value) for value in score[:3]]) for n, score in found]
            _with_intervals(axes, shown, i, len(summary.arms), arm, colour(summary, arm))
    _lengths(axes, lengths)
    if measure is SHARE:
        axes.set_ylim(-3, 103)
    axes.set_ylabel("score, percent" if measure is SHARE else f"{measure.name}, lower is better", fontsize=8)
    figure.legend(fontsize=7, frameon=False, loc="outside upper center", ncols=4)
    return _svg(figure)


def grid(summary: Summary, task: str) -> str:
    """A heat map of length by depth for each arm."""
    lengths, depths, arms = summary.lengths(task), summary.depths(task), summary.arms
    figure, _ = _figure(1.3 + len(arms) * (0.7 + 0.42 * len(lengths)), 1.1 + 0.32 * len(depths), axes=False)
    for axes, arm in zip(np.atleast_1d(figure.subplots(1, len(arms), sharey=True)), arms, strict=True):
        means = [[_mean(summary.score(task=task, length=n, depth=d, arm=arm)) for n in lengths] for d in depths]
        image = axes.imshow(np.array(means, dtype=float), cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for row, values in enumerate(means):
            for column, value in enumerate(values):
                ink = "#ffffff" if value < 0.15 or value > 0.85 else "#222222"
                axes.text(column, row, _percent(value), ha="center", va="center", fontsize=6, color=ink)
        axes.set_title(arm, loc="left", fontsize=8)
        axes.set_xticks(range(len(lengths)), [_short(n) for n in lengths], fontsize=7)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        image.set_clim(0, 1)
    figure.axes[0].set_ylabel("depth", fontsize=8)
    return _svg(figure)


def positions(summary: Summary, task: str) -> str | None:
    """Perplexity by position; None for tasks that have none."""
    found = {arm: summary.perplexities(task, arm) for arm in summary.arms}
    if not any(found.values()):
        return None
    figure, axes = _figure(4.6, 2.7)
    for arm, curve in found.items():
        if curve:
            firsts, values = list(curve), list(curve.values())
            axes.stairs(
                values, [*firsts, 2 * firsts[-1] or 256], baseline=None, color=colour(summary, arm), label=arm, lw=1.6
            )
    axes.set_xscale("symlog", base=2, linthresh=256)
    starts = sorted({first for curve in found.values() for first in curve})
    axes.set_xticks(starts, [_short(first) if first else "0" for first in starts], fontsize=7)
    axes.set_xlabel("position", fontsize=8)
    axes.set_ylabel("perplexity", fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    return _svg(figure)


def costs(summary: Summary, name: str) -> str | None:
    """One of the figures by length; None if no arm has it."""
    (figure, axes), (unit, scale) = _figure(3.6, 2.3), FIGURES[name]
    lengths = summary.all_lengths
    drawn = False
    for arm in summary.arms:
        found = [(n, v) for n in lengths if (v := summary.figure(name, length=n, arm=arm)) is not None]
        if found:
            at, values = zip(*found, strict=True)
            style = {"marker": "o", "markersize": 3, "lw": 1.4, "color": colour(summary, arm), "label": arm}
            axes.plot(at, [value / scale for value in values], **style)
            drawn = True
    if not drawn:
        return None
    _lengths(axes, lengths)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(unit, fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    return _svg(figure)


def _with_intervals(
    axes: Any, found: Sequence[tuple[int, Sequence[float]]], i: int, arms: int, label: str, colour: str
) -> None:
    """found: a mean and its interval's ends by length. Points lie a little apart, so that arms that are equal can be
    told apart."""
    at = [length * 1.02 ** (i - (arms - 1) / 2) for length, _ in found]
    means, lows, highs = zip(*(values for _, values in found), strict=True)
    around = [np.subtract(means, lows), np.subtract(highs, means)]
    axes.errorbar(at, means, yerr=around, marker="o", markersize=3, capsize=2, lw=1.4, color=colour, label=label)


def _lengths(axes: Any, lengths: Sequence[int]) -> None:
    if min(lengths) > 0:
        axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_short(n) for n in lengths], fontsize=7)
    axes.minorticks_off()
    axes.set_xlabel("tokens", fontsize=8)


def _figure(width: float, height: float, *, axes: bool = True) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the report's pictures need matplotlib: pip install 'segcore[eval]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    if not axes:
        return figure, None
    made = figure.subplots()
    made.spines[["top", "right"]].set_visible(False)
    made.tick_params(labelsize=7)
    made.grid(axis="y", color="#e4e7eb", lw=0.6)
    made.set_axisbelow(True)
    return figure, made


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": "segcore", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _mean(score: Interval | None) -> float:
    return float("nan") if score is None else score.mean


def _percent(value: float) -> str:
    return "–" if value != value else f"{100 * value:.0f}"


def _short(tokens: int) -> str:
    if tokens >= 1024 and tokens % 1024 == 0:
        return f"{tokens // 1024}K"
    return f"{tokens:,}" if tokens else "any"
