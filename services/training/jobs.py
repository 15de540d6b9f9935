"""Runs as Ray jobs: submitted, followed, stopped, listed and resumed from anywhere, by the cluster's Jobs API.

A job belongs to the cluster: it goes on when whoever follows it goes away.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from segcore.errors import NotFound, Unavailable
from services.training.config import TrainConfig
from services.training.follow import follow
from services.training.train import check_start

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

CONFIG = "config.json"
# What Ray would take in place of the address that it is given.
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
MODULE = "services.training.train"
# A job's log may break off while the job goes on; then it is asked for again.
RETRY_S = 1.0
# So long a cluster that has just started may have nobody yet who runs jobs.
PATIENCE_S = 60.0


def run_locally(config: TrainConfig, console: Console, *, resume: bool = False) -> int:
    """Run on this machine, on a Ray of its own, until it ends; its whole log is kept in the run's folder."""
    check_start(config, resume=resume)
    config.folder.mkdir(parents=True, exist_ok=True)
    with _written(config) as file, open(config.folder / "log.txt", "a", buffering=1) as log:
        command = [sys.executable, "-m", MODULE, str(file), "--local", *(["--resume"] if resume else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            status = follow(process.stdout, console, log.write)
            for line in process.stdout:
                log.write(line)
        return status or process.returncode


class Jobs:
    """Training jobs of a cluster. address: its dashboard's, http://..., or ray://...; None: RAY_ADDRESS, else this
    machine. Raises Unavailable where nobody answers."""

    def __init__(self, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from ray.job_submission import JobSubmissionClient

        try:
            with _without(*(ADDRESSES if address else ())):
                self._client: JobSubmissionClient = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise Unavailable(
                f"no Ray cluster takes jobs at {address or 'this machine'}: {first_line} Name one with --address, or"
                " train here with --local"
            ) from error

    def submit(self, config: TrainConfig, *, resume: bool = False) -> str:
        """Start a run; returns the job's name."""
        with _written(config) as file:
            return self._patiently(
                entrypoint=f"python -m {MODULE} {CONFIG}{' --resume' if resume else ''}",
                submission_id=f"{config.name}-{datetime.now():%Y%m%d-%H%M%S-%f}",
                metadata={"segcore": "train", "run": config.name, "config": config.to_json()},
                runtime_env={"working_dir": str(file.parent)},
            )

    def _patiently(self, **job: Any) -> str:
        """Submit, again and again while the cluster is starting."""
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return str(self._client.submit_job(**job))
            except RuntimeError as error:
                if "try again later" not in str(error) or time.monotonic() > until:
                    raise Unavailable(f"the cluster doesn't take the job: {error}") from error
            time.sleep(RETRY_S)

    def follow(self, job: str, console: Console) -> int:
        """Show a job until it ends; 0 if it did its work."""
        return follow(self._lines(self.find(job).submission_id or job), console)

    def stop(self, job: str) -> str:
        """End a run, which keeps its checkpoints; returns the job's name once it has ended."""
        name = self.find(job).submission_id or job
        self._client.stop_job(name)
        while not self._client.get_job_status(name).is_terminal():
            time.sleep(RETRY_S)
        return name

    def config(self, job: str) -> TrainConfig:
        """What a job was submitted with."""
        return TrainConfig.model_validate_json((self.find(job).metadata or {})["config"])

    def find(self, job: str) -> JobDetails:
        """A training job by its name, or the latest of a run by the run's. Raises NotFound."""
        for details in self.all():
            if job in (details.submission_id, (details.metadata or {})["run"]):
                return details
        raise NotFound(f"there is no training job or run {job!r}; see `segcore train list`", job=job)

    def all(self) -> list[JobDetails]:
        """Training jobs, the latest first."""
        ours = [job for job in self._client.list_jobs() if (job.metadata or {}).get("segcore") == "train"]
        return sorted(ours, key=lambda job: job.start_time or 0, reverse=True)

    def table(self) -> Table:
        table = Table("job", "run", "status", "began", "took", box=None)
        for job in self.all():
            began = datetime.fromtimestamp((job.start_time or 0) / 1000)
            took = ((job.end_time or 1000 * time.time()) - (job.start_time or 0)) / 1000
            run = (job.metadata or {})["run"]
            table.add_row(job.submission_id, run, str(job.status.value), f"{began:%F %T}", f"{took:,.0f} s")
        return table

    def _lines(self, job: str) -> Iterator[str]:
        """A job's log, line by line, until the job has ended."""
        loop = asyncio.new_event_loop()
        try:
            seen = 0
            while True:
                ended = self._client.get_job_status(job).is_terminal()
                for number, line in enumerate(self._once(job, loop)):
                    if number >= seen:
                        seen = number + 1
                        yield line
                if ended:
                    return
                time.sleep(RETRY_S)
        finally:
            loop.close()

    def _once(self, job: str, loop: asyncio.AbstractEventLoop) -> Iterator[str]:
        """The log as far as one connection brings it."""
        chunks, rest = self._client.tail_job_logs(job), ""
        try:
            while True:
                *lines, rest = (rest + loop.run_until_complete(anext(chunks))).split("\n")
                yield from lines
        except StopAsyncIteration:
            if rest:
                yield rest
        except (OSError, RuntimeError):
            pass  # the connection broke off
        finally:
            loop.run_until_complete(chunks.aclose())


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Without these variables of the environment."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= kept


@contextmanager
def _written(config: TrainConfig) -> Iterator[Path]:
    """The configuration as a file in a folder of its own, with all paths absolute."""
    with tempfile.TemporaryDirectory(prefix="segcore-train-") as folder:
        file = Path(folder) / CONFIG
        file.write_text(config.to_json())
        yield file
