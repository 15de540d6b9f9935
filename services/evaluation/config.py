"""What an evaluation is made of. Read from a YAML file, whose faults are told with lines; see docs/evaluation.md."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from segcore.config import GIB, SegmentConfig
from segcore.errors import ConfigError
from segcore.presets import DEFAULT_MODEL, model_segment
from services.config_file import read_config
from services.evaluation.version import code_digest

# What doesn't change a result, and may differ when a run is taken up again.
FREE = ("storage", "workers", "baseline")


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    """Relative paths are relative to the file that names them."""
    path = path.expanduser()
    if path.is_absolute():  # Ray takes a job's folder away while it still ends
        return path
    folder: Path = (info.context or {}).get("folder") or Path.cwd()
    return folder / path


def _if_there(name: str, info: ValidationInfo) -> str:
    """Names of paths that are there, beside the file, become absolute; whatever else has a name keeps it."""
    path = _beside_the_file(Path(name), info)
    return str(path) if {"/", "."} & set(name) and path.exists() else name


Where = Annotated[Path, AfterValidator(_beside_the_file)]
Named = Annotated[str, AfterValidator(_if_there)]
Lead = Literal["none", "question", "answer"]


class Section(BaseModel):
    """A mapping of the file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TaskSection(Section):
    """A task, and how much of it. What else is given are options of the task.

    label: what reports call it; None: the task's name. lengths: tokens of an item, answer included. depths: where what
    is asked for stands, a cell of the grid each; empty: anywhere. items: in each cell, default 8; of a file of data,
    default all. max_tokens: of an answer; default 48, or the benchmark's. data: a file of them, for tasks that have it.
    lead: the answer's beginning, where a task has one, is put at the end of the question, or written as the answer's
    beginning, which engines alone can do.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    task: str
    label: str | None = None
    lengths: tuple[Annotated[int, Field(ge=1)], ...] = ()
    depths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    items: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    lead: Lead = "none"

    @model_validator(mode="before")
    @classmethod
    def _find_data(cls, given: Any, info: ValidationInfo) -> Any:
        if isinstance(given, dict) and isinstance(given.get("data"), str) and {"/", "."} & set(given["data"]):
            return given | {"data": str(_beside_the_file(Path(given["data"]), info))}
        return given

    @property
    def name(self) -> str:
        return self.label or self.task

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ArmSection(Section):
    """What is judged: a model under a policy, in this process's engine; or a service that runs.

    segment: "policy", and its options that differ from the model's preset or the policy's defaults. heads: a file of
    `segcore heads`. adapter: the directory of one, or "default", what is shipped for the model; its policy is then the
    preset.
    service: the address of a segcore service, HOST:PORT. url: of an OpenAI-compatible endpoint, such as
    http://HOST:PORT/v1, with `served_model`, the model's name there; key_variable: the environment variable that holds
    the key to it, if it asks for one. timeout_s: what it may take between two of its words.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+-]*$")
    model: Named | None = None
    adapter: Where | Literal["default"] | None = None
    segment: dict[str, Any] = {}
    preset: Literal["default", "paper"] = "default"
    heads: Where | None = None
    dtype: str = "auto"
    service: str | None = None
    url: str | None = None
    served_model: str | None = None
    key_variable: str | None = None
    timeout_s: float = Field(default=600, gt=0)

    @model_validator(mode="after")
    def _one_kind(self) -> ArmSection:
        if self.service and self.url:
            raise ValueError("an arm is an engine, a service or a url")
        ours = ("adapter", "dtype", "heads", "model", "preset", "segment")
        chosen = [name for name in ours if getattr(self, name) != type(self).model_fields[name].default]
        if not self.local and chosen:
            raise ValueError(f"{', '.join(chosen)}: the service's own choice")
        if (self.url is None) != (self.served_model is None):
            raise ValueError("url and served_model go together")
        return self

    @property
    def local(self) -> bool:
        """Whether it runs in a worker's own engine."""
        return self.service is None and self.url is None

    def segment_config(self, model: str) -> SegmentConfig:
        """Raises ConfigError."""
        return model_segment(model, self.segment, preset=self.preset, adapter=self.adapter, heads=self.heads)


class WorkersSection(Section):
    """count: actors. cpus, gpus: of each. threads: torch's; None: as many as cpus. failures: how many workers may die
    over one item before it is given up."""

    count: int = Field(default=1, ge=1)
    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)
    threads: int | None = Field(default=None, ge=1)
    failures: int = Field(default=2, ge=0)


class EvalConfig(Section):
    """An evaluation.

    model: of arms that name none. tokenizer: a model whose tokens lengths are counted in, for all arms alike; None:
    `model`. haystack: "python", "essays", "hotpotqa", or a text file or folder; haystack_part: the part of it that
    training leaves alone, or all of it. baseline: the arm that others are compared with; None: the first. truncate:
    documents too long for an engine are cut in their middle, those that an endpoint cuts by itself are let pass, and
    both are counted; else they are errors. past_bytes: of host memory for past KV.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: Named = DEFAULT_MODEL
    tokenizer: Named | None = None
    haystack: Named = "python"
    haystack_part: Literal["eval", "all"] = "eval"
    seed: int = 0
    tasks: tuple[TaskSection, ...] = Field(min_length=1)
    arms: tuple[ArmSection, ...] = Field(min_length=1)
    baseline: str | None = None
    truncate: bool = False
    past_bytes: int = Field(default=8 * GIB, ge=0)
    workers: WorkersSection = WorkersSection()
    storage: Where = Field(default=Path("evaluations"), validate_default=True)

    @field_validator("tasks", "arms")
    @classmethod
    def _different(cls, sections: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [section.name for section in sections]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{', '.join(sorted(twice))}: the name is there twice; give one of them another")
        return sections

    @model_validator(mode="after")
    def _possible(self) -> EvalConfig:
        if self.baseline is not None and self.baseline not in {arm.name for arm in self.arms}:
            raise ValueError(f"baseline: there is no arm {self.baseline!r}")
        for arm in self.arms:
            try:
                if arm.local:
                    arm.segment_config(arm.model or self.model)
            except ConfigError as error:
                raise ValueError(f"arm {arm.name!r}: {error.message}") from error
        for task in self.tasks:
            if task.lead == "answer" and not all(arm.local for arm in self.arms):
                raise ValueError(f"task {task.name!r}: a service can't be given the beginning of its answer")
        return self

    @classmethod
    def read(cls, path: Path) -> EvalConfig:
        """Read a YAML file. Raises ConfigError that tells each fault with its line."""
        return read_config(path, cls)

    def to_json(self) -> str:
        """What was set, with paths absolute, for another process; `model_validate_json` reads it."""
        return self.model_copy(update={"storage": self.storage}).model_dump_json(exclude_unset=True)

    @property
    def digest(self) -> str:
        """A hash of everything that results depend on, the code that makes items and judges answers included."""
        parts = {name: value for name, value in self.model_dump(mode="json").items() if name not in FREE}
        parts["code"] = code_digest()
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=5).hexdigest()

    @property
    def run_id(self) -> str:
        """The run's name: what is asked again with the same settings goes on with the same run."""
        return f"{self.name}-{self.digest}"

    @property
    def folder(self) -> Path:
        return self.storage / self.run_id

    @property
    def baseline_arm(self) -> str:
        return self.baseline or self.arms[0].name
