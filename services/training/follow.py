"""A training run seen from outside: what is shown of its log's lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console

from services import follow as runs
from services.follow import Said


def follow(lines: Iterable[str], console: Console, keep: Callable[[str], object] = lambda line: None) -> int:
    """Show a run until its log ends. keep: is handed every line. Returns 0 for a run that came to its end, else 1."""
    return runs.follow(lines, console, numbers=_numbers, end=_end, keep=keep)


def _numbers(said: Said) -> str:
    """The numbers of a line, shortly."""
    shown = {"loss": "loss {:.4f}", "tokens_per_s": "{:,.0f} tokens/s", "eval_loss": "evaluation: loss {:.4f}"}
    shown["eval_accuracy"] = "answers right {:.0%}"
    return ", ".join(form.format(said[name]) for name, form in shown.items() if name in said)


def _end(said: Said) -> str:
    where = f"; {said['checkpoint']} is exported to {said['export']}" if "export" in said else ""
    return f"done after {said['step']} steps{where}"
