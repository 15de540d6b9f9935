"""A run seen from outside: its log's lines become a progress bar, and an exit status."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from services.training.metrics import told

# Of a run that ends without a word of its own, so many lines are shown.
LAST_LINES = 30


def follow(lines: Iterable[str], console: Console, keep: Callable[[str], object] = lambda line: None) -> int:
    """Show a run until its log ends. keep: is handed every line. Returns 0 for a run that came to its end, else 1."""
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
                console.print(_end(said), highlight=False, soft_wrap=True)
                return 0
            elif "step" in said:
                bar.update(task, completed=said["step"], total=said["steps"], description=_numbers(said))
                if not console.is_terminal or "eval_loss" in said:
                    console.print(f"step {said['step']} of {said['steps']}: {_numbers(said)}", highlight=False)
            elif "note" in said:
                console.print(said["note"], highlight=False, soft_wrap=True)
            elif "warning" in said:
                console.print(f"warning: {said['warning']}", highlight=False, soft_wrap=True)
            elif "error" in said:
                console.print(f"segcore: {said['error']}", highlight=False, soft_wrap=True)
                return 1
    console.print("segcore: the run ended without a result; its log ends with:\n" + "\n".join(last), markup=False)
    return 1


def _numbers(said: dict[str, Any]) -> str:
    """The numbers of a line, shortly."""
    shown = {"loss": "loss {:.4f}", "tokens_per_s": "{:,.0f} tokens/s", "eval_loss": "evaluation: loss {:.4f}"}
    shown["eval_accuracy"] = "answers right {:.0%}"
    return ", ".join(form.format(said[name]) for name, form in shown.items() if name in said)


def _end(said: dict[str, Any]) -> str:
    where = f"; {said['checkpoint']} is exported to {said['export']}" if "export" in said else ""
    return f"done after {said['step']} steps{where}"
