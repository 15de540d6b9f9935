"""`segcore eval`: run an evaluation here or as a job, see to jobs, write reports, compare runs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from segcore.errors import InvalidRequest
from services.evaluation.config import EvalConfig
from services.evaluation.job import WIDTH, Jobs
from services.evaluation.report import write_report
from services.evaluation.run import evaluate
from services.evaluation.summary import Summary
from services.evaluation.tables import compared, scores

# What takes so many words after it; anything else is a configuration.
ACTS = {"report": 1, "compare": 2, "follow": 1, "stop": 1, "list": 0}


def run_eval(words: list[str], address: str | None, *, no_ray: bool = False, detach: bool) -> int:
    """Returns the exit status. Raises SegcoreError."""
    act, *rest = words if words[0] in ACTS else ("start", *words)
    if len(rest) != ACTS.get(act, 1):
        raise InvalidRequest(f"`segcore eval {' '.join(words)}`: see `segcore eval --help`")
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    match act:
        case "report":
            print(write_report(Path(rest[0])))
        case "compare":
            console.print(compared(*(Summary.read(Path(folder)) for folder in rest)))
        case "start" if not (address or "").startswith("http"):
            if detach:
                raise InvalidRequest("--detach is for jobs: give --address http://... of a cluster")
            _run(EvalConfig.read(Path(rest[0])), address, console, ray=not no_ray)
        case "start":
            return _submit(EvalConfig.read(Path(rest[0])), Jobs(address), console, detach=detach)
        case _:
            return Jobs(address).see_to(act, rest, console)
    return 0


def _submit(config: EvalConfig, jobs: Jobs, console: Console, *, detach: bool) -> int:
    job = jobs.submit(config)
    console.print(f"submitted {job}", highlight=False)
    return 0 if detach else jobs.see_to("follow", [job], console)


def _run(config: EvalConfig, address: str | None, console: Console, *, ray: bool) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)
        folder = evaluate(
            config,
            address=address,
            ray=ray,
            on_result=lambda done, total, arm: bar.update(
                task, completed=done, total=total, description=arm or "starting"
            ),
        )
    page = write_report(folder)
    console.print(scores(Summary.read(folder)))
    print(page)
