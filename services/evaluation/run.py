"""A run: cases are dealt to workers on Ray, and their results kept as they come.

A worker that dies is replaced, and its case dealt again: it had no result yet. A run that is stopped goes on where it
was, for its folder bears the name of its settings.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from segcore.errors import ConfigError, SegcoreError, Unavailable
from services.evaluation.config import EvalConfig
from services.evaluation.processes import Processes
from services.evaluation.results import Key, Result, ResultFile
from services.evaluation.tasks.base import Case, Suite
from services.evaluation.tasks.registry import open_suites
from services.evaluation.version import code_digest
from services.local_ray import prepare_ray, start_ray

# A task, and where it stands in a report.
Cell = tuple[str, int, float | None]

RESULTS, SETTINGS = "results.jsonl", "settings.json"
OnResult = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """Every case of every arm, and what it stands for."""

    config: EvalConfig
    suites: dict[str, Suite]
    cases: dict[str, Case] = field(default_factory=dict)

    @classmethod
    def of(cls, config: EvalConfig) -> Plan:
        """Raises ConfigError."""
        suites = open_suites(config)
        return cls(config, suites, {case.id: case for suite in suites.values() for case in suite.cases()})

    @property
    def keys(self) -> list[Key]:
        """Arm by arm, so that a worker changes its arm seldom; and all cells of an arm come to their end together, so
        that a run which is stopped has as large a part of each."""
        seen: Counter[Cell] = Counter()
        of_cell = Counter(map(_cell, self.cases.values()))
        share: dict[str, float] = {}
        for name, case in self.cases.items():
            share[name] = seen[_cell(case)] / of_cell[_cell(case)]
            seen[_cell(case)] += 1
        cases = sorted(self.cases, key=share.__getitem__)
        return [(arm.name, case) for arm in self.config.arms for case in cases]

    def document(self, key: Key) -> tuple[str, str]:
        """Alike for an arm's cases that are about the same document."""
        arm, case = key
        return arm, self._documents[case]

    @cached_property
    def _documents(self) -> dict[str, str]:
        return {name: self.suites[case.task].document(case) for name, case in self.cases.items()}

    @property
    def data(self) -> dict[str, str]:
        """A hash of each task's data."""
        return {name: suite.digest for name, suite in self.suites.items()}


def evaluate(
    config: EvalConfig, *, address: str | None = None, ray: bool = True, on_result: OnResult | None = None
) -> Path:
    """Run to the end, or go on with a run that was stopped; returns its folder, with all results in it.

    address: a Ray cluster's; None: a Ray of this process's own, unless one is connected. ray: False: workers are
    processes of this machine. on_result is told how many results there are, of how many, and the arm of the latest.
    Raises SegcoreError.
    """
    plan = Plan.of(config)
    check_settings(plan)
    told = on_result or (lambda done, total, arm: None)
    with closing(ResultFile(config.folder / RESULTS)) as results:
        if unknown := results.results.keys() - set(plan.keys):
            raise ConfigError(f"{results.path} has results of other cases, such as {sorted(unknown)[0]}")
        told(len(results.results), len(plan.keys), "")
        if left := results.left(plan.keys):
            with _ray(config, address) if ray else nullcontext():
                for result in dealt(plan, left, _Pool(config) if ray else Processes(config)):
                    results.add(result)
                    told(len(results.results), len(plan.keys), result["arm"])
        assert set(results.results) == set(plan.keys), "a case was lost"
    return config.folder


def check_settings(plan: Plan) -> None:
    """Write a run's settings, or compare with those that are there. Raises ConfigError if its data have changed."""
    path = plan.config.folder / SETTINGS
    settings = {
        "run": plan.config.run_id,
        "code": code_digest(),
        "planned": len(plan.keys),
        "data": plan.data,
        "config": plan.config.model_dump(mode="json"),
    }
    if path.exists():
        before = json.loads(path.read_text())
        changed = [name for name, digest in plan.data.items() if before["data"].get(name) != digest]
        if changed:
            raise ConfigError(
                f"the data of {', '.join(changed)} have changed since this run began: remove {path.parent}, or give the"
                " run another name"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1))


def _cell(case: Case) -> Cell:
    return case.task, case.length, case.depth


class Pool(Protocol):
    """What does the cases; `_Pool`, but for tests."""

    def start(self, worker: Any | None, key: Key, case: Case) -> None: ...

    def wait(self) -> tuple[Any | None, Key, Result | None]: ...

    @property
    def busy(self) -> bool: ...


@contextmanager
def _ray(config: EvalConfig, address: str | None) -> Iterator[None]:
    if address is None:
        prepare_ray()
    import ray

    own = not ray.is_initialized()
    if own and address is not None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="WARNING")
        except (ConnectionError, RuntimeError, ValueError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise Unavailable(f"no Ray cluster answers at {address}: {first_line}") from error
    elif own:
        start_ray(config.workers.count * config.workers.cpus + 1)
    try:
        yield
    finally:
        if own:
            ray.shutdown()


class _Pool:
    """Workers as Ray's actors, one case at a time each."""

    def __init__(self, config: EvalConfig) -> None:
        import ray

        from services.evaluation.worker import Worker

        needs, self._settings = config.workers, config.model_dump(mode="json")
        self._make = ray.remote(num_cpus=needs.cpus, num_gpus=needs.gpus)(Worker)
        self._busy: dict[Any, tuple[Any, Key]] = {}

    def start(self, worker: Any | None, key: Key, case: Case) -> None:
        """Give a case to a worker that is idle, or to a new one."""
        actor = worker or self._make.remote(self._settings)
        self._busy[actor.run.remote(key[0], tuple(case))] = actor, key

    def wait(self) -> tuple[Any | None, Key, Result | None]:
        """A worker that is done, and its result; None for both if it died. Raises what the worker raised."""
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        (future, *_), _ = ray.wait(list(self._busy))
        actor, key = self._busy.pop(future)
        try:
            return actor, key, ray.get(future)
        except (RayActorError, OutOfMemoryError):  # the latter: Ray killed it, for the node's sake
            return None, key, None
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, SegcoreError) else error from None

    @property
    def busy(self) -> bool:
        return bool(self._busy)


def dealt(plan: Plan, left: list[Key], pool: Pool) -> Iterator[Result]:
    """The results of all these, each once, in the order in which they come."""
    waiting, deaths = deque(left), dict.fromkeys(left, 0)
    # Workers, and what each did last; None before and after they live.
    idle: list[tuple[Any | None, Key | None]] = [(None, None)] * min(plan.config.workers.count, len(left))
    busy: list[Key] = []
    while waiting or pool.busy:
        while waiting and idle:
            worker, before = idle.pop()
            key = _next(plan, waiting, before, busy)
            busy.append(key)
            pool.start(worker, key, plan.cases[key[1]])
        worker, key, result = pool.wait()
        busy.remove(key)
        idle.append((worker, None if worker is None else key))
        if result is not None:
            yield result
            continue
        deaths[key] += 1
        if deaths[key] > plan.config.workers.failures:
            yield _given_up(plan, key, deaths[key])
        else:
            waiting.appendleft(key)


def _next(plan: Plan, waiting: deque[Key], before: Key | None, busy: Collection[Key]) -> Key:
    """Take out what a worker should do next: ask about the document that it has read, else stay with the arm whose turn
    it is, and there leave others theirs; of equals, what waits longest."""
    read, others, arm = before and plan.document(before), set(map(plan.document, busy)), waiting[0][0]
    key = min(waiting, key=lambda k: ((at := plan.document(k)) != read, k[0] != arm, at in others))
    waiting.remove(key)
    return key


def _given_up(plan: Plan, key: Key, deaths: int) -> Result:
    case = plan.cases[key[1]]
    message = f"{deaths} workers died over it; is there too little memory?"
    told = {"task": case.task, "length": case.length, "depth": case.depth}
    return {"arm": key[0], "case": case.id, **told, "error": {"kind": "WorkerDied", "message": message}}
