"""What `segcore train` does with its words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from segcore.errors import InvalidInput
from services.training.config import TrainConfig
from services.training.folders import Progress, export
from services.training.jobs import Jobs, run_locally

ARGUMENTS = {"resume": 1, "follow": 1, "stop": 1, "list": 0, "export": 2}


def train(words: Sequence[str], *, address: str | None, local: bool, no_ray: bool = False, detach: bool) -> int:
    """Returns the exit status. Raises SegcoreError, OSError."""
    act, *rest = words if words[0] in ARGUMENTS else ("start", *words)
    if len(rest) != ARGUMENTS.get(act, 1):
        raise InvalidInput(f"`segcore train {' '.join(words)}`: see `segcore train --help`")
    console = Console()
    if act == "export":
        checkpoint, target = map(Path, rest)
        Progress.read(checkpoint)
        export(checkpoint, target)
        return 0
    if local or no_ray:
        if act not in ("start", "resume"):
            raise InvalidInput(f"runs of this machine have no jobs to {act}: they end with the command")
        return run_locally(TrainConfig.read(Path(rest[0])), console, resume=act == "resume", ray=not no_ray)
    if act in ("list", "stop", "follow"):
        return Jobs(address).see_to(act, rest, console)
    file = Path(rest[0])
    config = TrainConfig.read(file) if act == "start" or file.suffix in (".yaml", ".yml") else None
    jobs = Jobs(address)
    job = jobs.submit(config or jobs.config(rest[0]), resume=act == "resume")
    console.print(f"submitted {job}", highlight=False)
    return 0 if detach else jobs.see_to("follow", [job], console)
