"""A study: arms that are trained and judged alike, from one file, by `segcore train` and `segcore eval`.

Arms are worked on side by side, `jobs` at a time, in the order of the file. What was done isn't done again, what was
stopped goes on, and an arm's scores are in study.json and study.md as soon as it has them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from segcore.errors import ConfigError
from services.config_file import describe, read_config
from services.evaluation.config import EvalConfig
from services.evaluation.run import SETTINGS
from services.evaluation.summary import Interval, Summary
from services.processes import end
from services.training.config import TrainConfig
from services.training.folders import Progress, latest
from services.training.metrics import LINES, read_lines

# From this share of the needed tokens on, a turn's facts count as found.
FOUND = 0.99

Config = TypeVar("Config", bound=BaseModel)


class ArmSection(BaseModel):
    """An arm, by what sets it apart.

    train: fields of a training run that differ from the study's; null: nothing is trained. of: an earlier arm, whose
    adapter is judged under this arm's segment, or, with `train`, is what training begins with. segment: it is judged
    under, if not under what it was trained with. rope: parameters of RoPE that take the place of the model's, and
    `positions` of what it has. evaluate: fields of an evaluation that differ from the study's. tasks: by name, those it
    is judged by; empty: all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: dict[str, Any] | None = None
    of: str | None = None
    segment: dict[str, Any] = {}
    rope: dict[str, Any] = {}
    evaluate: dict[str, Any] = {}
    tasks: tuple[str, ...] = ()


class Study(BaseModel):
    """train, evaluate: fields of `TrainConfig` and `EvalConfig` that arms share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    train: dict[str, Any]
    evaluate: dict[str, Any]
    arms: dict[str, ArmSection]
    storage: Path = Path("studies")

    @model_validator(mode="after")
    def _ordered(self) -> Study:
        known: set[str] = set()
        for name, arm in self.arms.items():
            tasks = {_name(task) for task in merged(self.evaluate, arm.evaluate).get("tasks", ())}
            if arm.of is not None and arm.of not in known:
                raise ValueError(f"arms.{name}.of: {arm.of!r} must be an earlier arm that is trained")
            if unknown := set(arm.tasks) - tasks:
                raise ValueError(f"arms.{name}.tasks: there is no {', '.join(sorted(unknown))}")
            if arm.train is not None:
                known.add(name)
        return self

    @classmethod
    def read(cls, path: Path, storage: Path | None = None) -> Study:
        """Read a YAML file, and check every run that it makes. storage: in place of the file's. Raises ConfigError."""
        study = read_config(path, cls)
        where = path.resolve().parent / study.storage if storage is None else storage.resolve()
        study = study.model_copy(update={"storage": where})
        for name in study.arms:
            study.training(name)
        return study

    @property
    def folder(self) -> Path:
        return self.storage / self.name

    def training(self, name: str) -> TrainConfig | None:
        """An arm's run, if it is trained. Raises ConfigError."""
        arm = self.arms[name]
        if arm.train is None:
            return None
        begun = {} if arm.of is None else {"adapter": str(self.folder / arm.of / "export")}
        own = {"name": name, "storage": str(self.folder)} | begun | self._model(name)
        return _valid(TrainConfig, merged(merged(self.train, arm.train), own), name)

    def evaluation(self, name: str) -> EvalConfig:
        """An arm's evaluation, once its adapter is there. Raises ConfigError."""
        arm, judged = self.arms[name], {"name": name} | self._model(name)
        learnt = name if arm.train is not None else arm.of
        if learnt is not None:
            judged["adapter"] = str(self.folder / learnt / "export")
        shared = {"model": self.train["model"]} | merged(self.evaluate, arm.evaluate)
        tasks = [task for task in shared["tasks"] if not arm.tasks or _name(task) in arm.tasks]
        own = {"name": name, "storage": str(self.folder / "evaluations"), "tasks": tasks}
        own["arms"] = [judged | {"segment": arm.segment}]
        return _valid(EvalConfig, shared | own, name)

    def _model(self, name: str) -> dict[str, str]:
        arm = self.arms[name]
        rope = arm.rope or (self.arms[arm.of].rope if arm.of else {})
        return {"model": str(scaled(self.train["model"], rope, self.folder / "models"))} if rope else {}


def _name(task: dict[str, Any]) -> Any:
    return task.get("label", task.get("task"))


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged, key by key; all else is replaced, and null takes a key away."""
    made = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(made.get(key), dict)
        made[key] = merged(made[key], value) if both else value
    return {key: value for key, value in made.items() if value is not None}


def scaled(model: str, rope: dict[str, Any], folder: Path) -> Path:
    """A model with other parameters of RoPE: its own files, but for config.json. Raises SegcoreError."""
    from segcore.presets import DEFAULT_MODEL
    from segcore.weights import default_model_directory

    own = default_model_directory() if model == DEFAULT_MODEL else Path(model)
    config = json.loads((own / "config.json").read_text())
    changes = dict(rope)
    positions = changes.pop("positions", config["max_position_embeddings"])
    config["rope_parameters"] = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10_000.0)}
    config["rope_parameters"] |= {"rope_type": "default"} | changes
    config["max_position_embeddings"] = positions
    made = folder / "-".join([own.name, *(f"{key}-{value}" for key, value in sorted(rope.items()))])
    made.mkdir(parents=True, exist_ok=True)
    for file in own.iterdir():
        if file.name not in ("config.json", "sha256.json") and not (made / file.name).exists():
            os.symlink(file.resolve(), made / file.name)
    (made / "config.json").write_text(json.dumps(config, indent=1))
    return made


class Work:
    """Does arms. ray: training and evaluation on Rays of their own; else without. until: time.monotonic() at which
    what still runs is stopped, to go on another time."""

    def __init__(self, study: Study, *, ray: bool, until: float) -> None:
        self._study, self._ray, self._until = study, ray, until
        self._trained = {name: threading.Event() for name, arm in study.arms.items() if arm.train is not None}
        self._writing = threading.Lock()
        study.folder.mkdir(parents=True, exist_ok=True)

    def all(self, names: Sequence[str], jobs: int) -> bool:
        """Whether all of these arms are done."""
        with ThreadPoolExecutor(jobs) as pool:
            return all(list(pool.map(self.arm, names)))

    def arm(self, name: str) -> bool:
        """Train, judge and tell; False if it didn't come to its end, whose cause is in its log."""
        of = self._study.arms[name].of
        if of is not None and not trained(self._study, of):
            self._trained[of].wait(max(0.0, self._until - time.monotonic()))
        begins = of is None or trained(self._study, of)
        done = begins and self._train(name) and self._judge(name)
        with self._writing:
            tell(self._study)
        return done

    def _train(self, name: str) -> bool:
        config = self._study.training(name)
        if config is None or trained(self._study, name):
            done = True
        else:
            file = _written(self._study.folder / f"{name}.train.json", config.to_json())
            how = "--local" if self._ray else "--no-ray"
            done = self._run(name, "services.training.train", str(file), "--retry", how)
        if name in self._trained:
            self._trained[name].set()
        return done

    def _judge(self, name: str) -> bool:
        file = _written(self._study.folder / f"{name}.eval.json", self._study.evaluation(name).to_json())
        return self._run(name, "services.cli", "eval", str(file), *([] if self._ray else ["--no-ray"]))

    def _run(self, name: str, module: str, *words: str) -> bool:
        left = self._until - time.monotonic()
        if left <= 0:
            return False
        with open(self._study.folder / f"{name}.log", "a") as log:
            process = subprocess.Popen([sys.executable, "-m", module, *words], stdout=log, stderr=subprocess.STDOUT)
            try:
                return process.wait(left) == 0
            except subprocess.TimeoutExpired:
                end(process)
                return False


def trained(study: Study, name: str) -> bool:
    """Whether an arm's run has come to its end."""
    config = study.training(name)
    assert config is not None
    newest = latest(config.folder)
    return newest is not None and Progress.read(newest).step >= config.steps and (config.folder / "export").exists()


def tell(study: Study) -> None:
    """Write what is known: study.json, and study.md for people."""
    told = {name: figures(study, name) for name in study.arms}
    _written(study.folder / "study.json", json.dumps({name: each for name, each in told.items() if each}, indent=1))
    _written(study.folder / "study.md", table(told))


def figures(study: Study, name: str) -> dict[str, Any]:
    """An arm's training and its scores, as far as they are there."""
    made: dict[str, Any] = {}
    if (config := study.training(name)) is not None and (lines := read_lines(config.folder / LINES)):
        made["training"] = lines[-1]
    # The run that was worked on last counts: others were of other settings.
    settings = (study.folder / "evaluations").glob(f"{name}-*/{SETTINGS}")
    for file in sorted(settings, key=lambda file: file.stat().st_mtime):
        summary = Summary.read(file.parent)
        if summary.arms == [name]:
            made["cells"] = [_cell(summary, task, n) for task in summary.tasks for n in summary.lengths(task)]
    return made


def _cell(summary: Summary, task: str, length: int) -> dict[str, Any]:
    """A task's score at a length; of turns, what was found, and the score of those whose facts were; of texts, the
    mean loss by position."""
    score = summary.score(task=task, length=length)
    cell: dict[str, Any] = {"task": task, "length": length, "score": score and score._asdict()}
    turns = [turn for result in summary.of(task=task, length=length) for turn in result.get("turns", ())]
    if known := [turn for turn in turns if turn.get("recall") is not None]:
        used = [turn["score"] for turn in known if turn["recall"] >= FOUND]
        cell["recall"] = sum(turn["recall"] for turn in known) / len(known)
        cell["found"] = len(used) / len(known)
        cell["score_if_found"] = Interval.of(used)._asdict() if used else None
    if by_position := [result["nats"] for result in summary.of(task=task, length=length) if "nats" in result]:
        cell["nats"] = {first: _mean_loss(by_position, first) for first in max(by_position, key=len)}
    if failures := summary.failures(task=task, length=length):
        cell["failures"] = failures
    return cell


def _mean_loss(by_position: list[dict[str, list[float]]], first: str) -> float:
    """Of the positions that begin with `first`, over texts."""
    sums, counts = zip(*(nats[first] for nats in by_position if first in nats), strict=True)
    return float(sum(sums) / sum(counts))


def table(told: dict[str, dict[str, Any]]) -> str:
    """Arms by tasks and lengths, in Markdown: score, and in brackets what was found. Perplexity is in nats."""
    cells = {(c["task"], c["length"]) for each in told.values() for c in each.get("cells", ())}
    names = [name for name, each in told.items() if each.get("cells")]
    lines = ["| task | tokens | " + " | ".join(names) + " |", "| --- " * (2 + len(names)) + "|"]
    for task, length in sorted(cells):
        row = [_told(told[name]["cells"], task, length) for name in names]
        lines.append(f"| {task} | {length:,} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _told(cells: Iterable[dict[str, Any]], task: str, length: int) -> str:
    cell = next((c for c in cells if (c["task"], c["length"]) == (task, length)), None)
    if cell is None or cell["score"] is None:
        return "–"
    found = f" [{cell['found']:.2f}]" if "found" in cell else ""
    return f"{cell['score']['mean']:.3f} n {cell['score']['items']}{found}"


def _valid(kind: type[Config], values: dict[str, Any], name: str) -> Config:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"arm {name!r}: {describe(fault)}" for fault in error.errors())) from error


def _written(path: Path, text: str) -> Path:
    """Whoever reads it meanwhile finds the old text or the new."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
    return path
