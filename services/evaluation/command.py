"""`segcore eval`: run an evaluation with a progress bar, write its report; compare two runs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from segcore.errors import InvalidRequest
from services.evaluation.config import EvalConfig
from services.evaluation.report import write_report
from services.evaluation.run import evaluate
from services.evaluation.summary import Interval, Summary, difference


def run_eval(words: list[str], address: str | None) -> int:
    """CONFIG.yaml, `report FOLDER`, or `compare A B`. Raises SegcoreError."""
    if words[0] == "compare":
        if len(words) != 3:
            raise InvalidRequest("segcore eval compare takes two runs' folders")
        Console().print(compared(Summary.read(Path(words[1])), Summary.read(Path(words[2]))))
    elif words[0] == "report":
        for folder in words[1:]:
            print(write_report(Path(folder)))
    elif len(words) != 1:
        raise InvalidRequest("segcore eval takes one configuration, or: report FOLDER, compare A B")
    else:
        _run(EvalConfig.read(Path(words[0])), address)
    return 0


def _run(config: EvalConfig, address: str | None) -> None:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("starting", total=None)
        folder = evaluate(
            config,
            address=address,
            on_result=lambda done, total, arm: bar.update(
                task, completed=done, total=total, description=arm or "starting"
            ),
        )
    page = write_report(folder)
    console.print(scores(Summary.read(folder)))
    print(page)


def scores(summary: Summary) -> Table:
    """Scores by task, length and arm."""
    counts = summary.counts
    out = Table(box=None, padding=(0, 2), caption=", ".join(f"{n} {what}" for what, n in counts.items()))
    for name in ("task", "tokens", *summary.arms):
        out.add_column(name, justify="left" if name == "task" else "right")
    for task in summary.tasks:
        for length in summary.lengths(task):
            found = [summary.score(task=task, length=length, arm=arm) for arm in summary.arms]
            out.add_row(task, f"{length:,}" if length else "any", *map(_told, found))
    return out


def compared(first: Summary, second: Summary) -> Table:
    """Arms of the same name in two runs, on the cases that both have."""
    out = Table(box=None, padding=(0, 2), caption="second less first, on the same items, with its 95% interval")
    for name in ("task", "tokens", "arm", first.config.run_id, second.config.run_id, "difference"):
        out.add_column(name, justify="left" if name in ("task", "arm") else "right")
    rows = 0
    for task in [task for task in first.tasks if task in second.tasks]:
        for length in [n for n in first.lengths(task) if n in second.lengths(task)]:
            for arm in [arm for arm in first.arms if arm in second.arms]:
                wanted = {"task": task, "length": length, "arm": arm}
                gain = difference(second.of(**wanted), first.of(**wanted))
                both = (_told(run.score(**wanted)) for run in (first, second))
                out.add_row(task, f"{length:,}", arm, *both, _told(gain, sign="+"))
                rows += 1
    if not rows:
        raise InvalidRequest("the two runs have no task, length and arm in common")
    return out


def _told(score: Interval | None, sign: str = "") -> str:
    if score is None:
        return "–"
    mean, low, high = (format(100 * value, f"{sign}.1f") for value in score[:3])
    return f"{mean} [dim]({low} to {high}, n {score.items})[/dim]"
