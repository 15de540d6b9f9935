"""Scores as tables for a terminal."""

from __future__ import annotations

from rich.table import Table

from segcore.errors import InvalidRequest
from services.evaluation.measures import Measure
from services.evaluation.summary import Interval, Summary, difference


def scores(summary: Summary) -> Table:
    """By task, length and arm."""
    counts = ", ".join(f"{n} {what}" for what, n in summary.counts.items())
    out = Table(box=None, padding=(0, 2), caption=f"{counts}; in percent, but for perplexity, where lower is better")
    for name in ("task", "tokens", *summary.arms):
        out.add_column(name, justify="left" if name == "task" else "right")
    for task in summary.tasks:
        for length in summary.lengths(task):
            found = [summary.score(task=task, length=length, arm=arm) for arm in summary.arms]
            out.add_row(task, length_told(length), *(_told(summary.measure(task), score) for score in found))
    return out


def compared(first: Summary, second: Summary) -> Table:
    """Arms of the same name in two runs, on the cases that both have."""
    caption = "second less first, on the same items, with its 95% interval"
    if first.code != second.code:
        caption += "; their items were made, or judged, by different code"
    out = Table(box=None, padding=(0, 2), caption=caption)
    for name in ("task", "tokens", "arm", first.run_id, second.run_id, "difference"):
        out.add_column(name, justify="left" if name in ("task", "arm") else "right")
    for task in [task for task in first.tasks if task in second.tasks]:
        measure = first.measure(task)
        for length in [n for n in first.lengths(task) if n in second.lengths(task)]:
            for arm in [arm for arm in first.arms if arm in second.arms]:
                wanted = {"task": task, "length": length, "arm": arm}
                gain = difference(second.of(**wanted), first.of(**wanted))
                both = (_told(measure, run.score(**wanted)) for run in (first, second))
                out.add_row(task, length_told(length), arm, *both, _told_change(measure, gain))
    if not out.rows:
        raise InvalidRequest("the two runs have no task, length and arm in common")
    return out


def length_told(length: int) -> str:
    return f"{length:,}" if length else "any"


def _told(measure: Measure, score: Interval | None) -> str:
    if score is None:
        return "–"
    mean, low, high = map(measure.told, score[:3])
    return f"{mean} [dim]({low} to {high}, n {score.items})[/dim]"


def _told_change(measure: Measure, gain: Interval | None) -> str:
    if gain is None:
        return "–"
    mean, low, high = map(measure.told_change, gain[:3])
    return f"{mean} [dim]({low} to {high}, n {gain.items})[/dim]"
