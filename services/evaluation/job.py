"""An evaluation as a Ray job: what runs on the cluster, and what is shown of it from outside."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from rich.console import Console

from segcore.errors import SegcoreError
from services import jobs
from services.evaluation.config import EvalConfig
from services.evaluation.report import write_report
from services.evaluation.run import evaluate
from services.evaluation.summary import Summary
from services.evaluation.tables import scores
from services.follow import Said, follow, tell

MODULE = "services.evaluation.job"
# Of tables, in characters, where it isn't known how wide they are read, as in a job's log.
WIDTH = 160


class Jobs(jobs.Jobs):
    """Evaluation jobs of a cluster."""

    def __init__(self, address: str | None) -> None:
        super().__init__("eval", address, otherwise="Without --address, the evaluation runs here")

    def submit(self, config: EvalConfig) -> str:
        """Start a run, or go on with it; returns the job's name."""
        return self.submit_module(MODULE, config.run_id, config.to_json())

    def follow(self, job: str, console: Console) -> int:
        return follow(self.lines(job), console, numbers=_numbers, end=_end)


def _numbers(said: Said) -> str:
    return str(said["arm"]) or "starts"


def _end(said: Said) -> str:
    return f"{said['table']}\n{said['page']}"


def main() -> int:
    """Run the evaluation of a file on the cluster whose job this is; returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    parser.add_argument("config", type=Path, metavar="JSON")
    config = EvalConfig.model_validate_json(parser.parse_args().config.read_text())
    try:
        folder = evaluate(
            config, address="auto", on_result=lambda done, total, arm: tell(step=done, steps=total, arm=arm)
        )
        page = write_report(folder)
    except SegcoreError as error:
        tell(error=error.message)
        return 1
    table = io.StringIO()
    Console(file=table, width=WIDTH).print(scores(Summary.read(folder)))
    tell(done=True, page=str(page), table=table.getvalue().rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
