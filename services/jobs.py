"""Ray jobs: submitted, followed, stopped and listed from anywhere, by a cluster's Jobs API.

A job belongs to the cluster: it goes on when whoever follows it goes away.
"""

from __future__ import annotations

import asyncio
import math
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from segcore.errors import NotFound, Unavailable

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

CONFIG = "config.json"
# What Ray would take in place of the address that it is given.
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# A job's log may break off while the job goes on; then it is asked for again.
RETRY_S = 1.0
# So long a cluster that has just started may have nobody yet who runs jobs.
PATIENCE_S = 60.0
# How Ray's client begins to say that its server didn't come.
_NOT_STARTED = "Initialization failure from server"


def _connected(address: str | None) -> JobSubmissionClient:
    """A client; tried again where Ray's own server for it didn't start, or ended as it started, as on a busy head."""
    from ray.job_submission import JobSubmissionClient

    until = math.inf
    while True:
        try:
            return JobSubmissionClient(address)
        except (RuntimeError, ConnectionError) as error:
            # From the first failure on: one attempt may take longer than that by itself.
            until = min(until, time.monotonic() + PATIENCE_S)
            if not str(error).startswith(_NOT_STARTED) or time.monotonic() > until:
                raise
        time.sleep(RETRY_S)


def _reason(error: Exception) -> str:
    """An error in a line; Ray's client puts a server's whole trace behind a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") else lines[0]


class Jobs(ABC):
    """Jobs of one command of ours on a cluster: `segcore COMMAND`.

    address: the cluster's dashboard, http://..., or ray://...; None: RAY_ADDRESS, else this machine. otherwise: what to
    do where nobody takes jobs, as the error says it. Raises Unavailable there.
    """

    def __init__(self, command: str, address: str | None, *, otherwise: str) -> None:
        self._command, self._there = command, f"--address {address}" if address else ""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            with _without(*(ADDRESSES if address else ())):
                self._client = _connected(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise Unavailable(
                f"no Ray cluster takes jobs at {address or 'this machine'}: {_reason(error)} {otherwise}"
            ) from error

    def submit_module(self, module: str, run: str, config: str, *flags: str) -> str:
        """Start `python -m MODULE CONFIG FLAGS` with a configuration's JSON; returns the job's name."""
        with written(config) as file:
            return self._patiently(
                entrypoint=" ".join(["python", "-m", module, CONFIG, *flags]),
                submission_id=f"{run}-{datetime.now():%Y%m%d-%H%M%S-%f}",
                metadata={"segcore": self._command, "run": run, "config": config},
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

    @abstractmethod
    def follow(self, job: str, console: Console) -> int:
        """Show a job until it ends; 0 if it did its work."""

    def see_to(self, act: str, words: Sequence[str], console: Console) -> int:
        """`list`, `stop JOB` or `follow JOB`; returns the exit status. Whoever stops following is told how to go on."""
        match act:
            case "list":
                console.print(self.table())
            case "stop":
                console.print(f"stopped {self.stop(words[0])}; what it has done is kept", highlight=False)
            case "follow":
                try:
                    return self.follow(words[0], console)
                except KeyboardInterrupt:
                    again = f"segcore {self._command} follow {words[0]} {self._there}".rstrip()
                    console.print(f"the run goes on; see it with `{again}`, end it with `stop`")
                    return 130
        return 0

    def stop(self, job: str) -> str:
        """End a run, which keeps what it has written; returns the job's name once it has ended."""
        name = self.find(job).submission_id or job
        self._client.stop_job(name)
        while not self._client.get_job_status(name).is_terminal():
            time.sleep(RETRY_S)
        return name

    def find(self, job: str) -> JobDetails:
        """A job by its name, or the latest of a run by the run's. Raises NotFound."""
        for details in self.all():
            if job in (details.submission_id, (details.metadata or {})["run"]):
                return details
        raise NotFound(f"there is no job or run {job!r}; see `segcore {self._command} list`", job=job)

    def all(self) -> list[JobDetails]:
        """The command's jobs, the latest first."""
        ours = [job for job in self._client.list_jobs() if (job.metadata or {}).get("segcore") == self._command]
        return sorted(ours, key=lambda job: job.start_time or 0, reverse=True)

    def table(self) -> Table:
        table = Table("job", "run", "status", "began", "took", box=None)
        for job in self.all():
            began = datetime.fromtimestamp((job.start_time or 0) / 1000)
            took = ((job.end_time or 1000 * time.time()) - (job.start_time or 0)) / 1000
            run = (job.metadata or {})["run"]
            table.add_row(job.submission_id, run, str(job.status.value), f"{began:%F %T}", f"{took:,.0f} s")
        return table

    def lines(self, job: str) -> Iterator[str]:
        """A job's log, line by line, until the job has ended. Raises NotFound."""
        name = self.find(job).submission_id or job
        loop = asyncio.new_event_loop()
        try:
            seen = 0
            while True:
                ended = self._client.get_job_status(name).is_terminal()
                for number, line in enumerate(self._once(name, loop)):
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
def written(config: str) -> Iterator[Path]:
    """A configuration's JSON as a file in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="segcore-job-") as folder:
        file = Path(folder) / CONFIG
        file.write_text(config)
        yield file
