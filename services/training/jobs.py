"""Training runs: on this machine, or as Ray jobs that are submitted, followed, stopped, listed and resumed."""

from __future__ import annotations

import signal
import subprocess
import sys

from rich.console import Console

from segcore.errors import AlreadyExists
from services import jobs
from services.processes import end
from services.training.config import TrainConfig
from services.training.follow import follow
from services.training.train import check_start

MODULE = "services.training.train"


def run_locally(config: TrainConfig, console: Console, *, resume: bool = False, ray: bool = True) -> int:
    """Run on this machine, on a Ray of its own or without one, until it ends; its log is kept in the run's folder."""
    check_start(config, resume=resume)
    config.folder.mkdir(parents=True, exist_ok=True)
    with jobs.written(config.to_json()) as file, open(config.folder / "log.txt", "a", buffering=1) as log:
        command = [sys.executable, "-m", MODULE, str(file), "--local" if ray else "--no-ray"]
        command += ["--resume"] if resume else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            before = signal.signal(signal.SIGTERM, _interrupt)
            try:
                status = follow(process.stdout, console, log.write)
                for line in process.stdout:
                    log.write(line)
            except BaseException:
                end(process)
                raise
            finally:
                signal.signal(signal.SIGTERM, before)
        return status or process.returncode


def _interrupt(*_: object) -> None:
    """Not by way of SIGINT, which what runs in a shell's background may ignore."""
    raise KeyboardInterrupt


class Jobs(jobs.Jobs):
    """Training jobs of a cluster."""

    def __init__(self, address: str | None) -> None:
        super().__init__("train", address, otherwise="Name one with --address, or train here with --local")

    def submit(self, config: TrainConfig, *, resume: bool = False) -> str:
        """Start a run; returns the job's name. Raises AlreadyExists if it is running: two would write in one folder."""
        for job in self.all():
            if (job.metadata or {})["run"] == config.name and not job.status.is_terminal():
                raise AlreadyExists(
                    f"the run is on its way as {job.submission_id}: stop it, or give this one another name"
                )
        return self.submit_module(MODULE, config.name, config.to_json(), *(["--resume"] if resume else []))

    def follow(self, job: str, console: Console) -> int:
        """Show a job until it ends; 0 if it did its work."""
        return follow(self.lines(job), console)

    def config(self, job: str) -> TrainConfig:
        """What a job was submitted with."""
        return TrainConfig.model_validate_json((self.find(job).metadata or {})["config"])
