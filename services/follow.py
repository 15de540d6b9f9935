"""A run seen from outside: it tells how it goes in lines of its log, which become a progress bar and an exit status."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Begins the lines of a log that are meant for programs; a JSON object follows.
MARK = "segcore-run "
# Of a run that ends without a word of its own, so many lines are shown.
LAST_LINES = 30
Said = dict[str, Any]


def tell(**values: Any) -> None:
    """Print a line that `told` finds again in a log."""
    # Not `print`, which Ray Train replaces in its workers by one that writes twice.
    sys.stdout.write(MARK + json.dumps(values) + "\n")
    sys.stdout.flush()


def told(line: str) -> Said | None:
    """What a line of a log says to programs; Ray puts the worker's name before it."""
    _, mark, rest = line.partition(MARK)
    if not mark:
        return None
    try:
        return dict(json.loads(rest.strip().removesuffix("\x1b[0m")))
    except ValueError:
        return None


def follow(
    lines: Iterable[str],
    console: Console,
    *,
    numbers: Callable[[Said], str],
    end: Callable[[Said], str],
    keep: Callable[[str], object] = lambda line: None,
) -> int:
    """Show a run until its log ends. Returns 0 for a run that came to its end, else 1.

    A run tells {"step", "steps", ...}, "note", "warning", and at its end "done" or "error". numbers, end: what is shown
    of a step and of the end. keep: is handed every line.
    """
    # What others wrote may look like markup.
    show = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    last: deque[str] = deque(maxlen=LAST_LINES)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starts", total=None)
        for line in lines:
            keep(line)
            said = told(line)
            if said is None:
                last.append(line.rstrip("\n"))
            elif "done" in said:
                show(end(said))
                return 0
            elif "step" in said:
                bar.update(task, completed=said["step"], total=said["steps"], description=numbers(said))
                if not console.is_terminal or "eval_loss" in said:
                    show(f"step {said['step']} of {said['steps']}: {numbers(said)}")
            elif "note" in said:
                show(said["note"])
            elif "warning" in said:
                show(f"warning: {said['warning']}")
            elif "error" in said:
                show(f"segcore: {said['error']}")
                return 1
    show("segcore: the run ended without a result; its log ends with:\n" + "\n".join(last))
    return 1
