"""What a training run is made of. Read from a YAML file, whose faults are told with lines; see docs/training.md."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from segcore.config import GIB, DuoConfig, SegmentConfig, SegmentedConfig
from segcore.errors import ConfigError
from segcore.presets import DEFAULT_MODEL, model_segment, read_card
from services.config_file import read_config
from services.training.data_config import DataConfig, Section, Where

# What doesn't change the curve, and may differ when a run is resumed; the data have a hash of their own.
FREE = ("name", "data", "workers", "checkpoints", "evaluation", "metrics", "storage", "device_bytes", "graphs")

Share = Annotated[float, Field(ge=0, lt=1)]


class SegmentSection(Section):
    """How the past is seen: a policy, as serving names them.

    preset: "default" or "paper". options: "policy", and what differs from the preset or the policy's defaults.
    file: a `segcore.json`, as lies beside trained weights. heads: a file of `segcore heads`.
    """

    preset: Literal["default", "paper"] = "default"
    options: dict[str, Any] = Field(default_factory=dict)
    file: Where | None = None
    heads: Where | None = None

    @model_validator(mode="before")
    @classmethod
    def _sort(cls, given: Any) -> Any:
        """A name is a preset or a file; keys that aren't ours are options of the policy."""
        if isinstance(given, str):
            return {"preset": given} if given in ("default", "paper") else {"file": given}
        if not isinstance(given, dict) or "options" in given:
            return given
        own = {name: given[name] for name in given if name in cls.model_fields}
        return {**own, "options": {name: given[name] for name in given if name not in own}}

    def config(self, model: str) -> SegmentConfig:
        """For a model by name. Raises ConfigError."""
        trained = None if self.file is None else read_card(self.file)
        return model_segment(model, self.options, preset=self.preset, trained=trained, heads=self.heads)


class OptimizerSection(Section):
    """AdamW. max_norm: gradients are scaled down to this norm, all together; null: as they are. weight_decay: of
    matrices; vectors have none."""

    learning_rate: float = Field(default=2e-5, gt=0)
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_norm: float | None = Field(default=1.0, gt=0)


class ScheduleSection(Section):
    """The learning rate: it rises over `warmup_steps`, then falls to the share `final` of itself at the last step."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    final: float = Field(default=0.1, ge=0, le=1)


class LoraSection(Section):
    """An adapter is trained, and the model's own weights are not; see `LoraSettings`."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    modules: tuple[str, ...] | None = None


class SelectorsSection(Section):
    """Selectors learn maps of their queries, apart from the model, by what streams say that answers need; with
    `attention_teaches`, of streams that say nothing, by what full attention pays to. weight: of their loss."""

    weight: float = Field(default=0.1, gt=0)
    attention_teaches: bool = False


class GatesSection(Section):
    """Gates of KV heads learn, under policy `duo`, which cells must see everything; weights stay (DuoAttention).
    share: of all cells, those with the largest gates, that will. sparsity: weight of the gates' sum."""

    share: float = Field(default=0.5, gt=0, le=1)
    sparsity: float = Field(default=0.05, ge=0)


class WorkersSection(Section):
    """count: workers, or [least, most] for as many as there is room for. parallel: "ddp", or "fsdp", which shards
    gradients, fp32 masters and the optimizer's state. cpus, gpus: of each. threads: torch's; null: as many as cpus.
    failures: how often the run goes on from its last checkpoint when a worker was lost."""

    count: int | tuple[int, int] = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)
    threads: int | None = Field(default=None, ge=1)
    failures: int = Field(default=3, ge=-1)

    @model_validator(mode="after")
    def _ordered(self) -> WorkersSection:
        if not 1 <= self.least <= self.most:
            raise ValueError("count must be a number of at least 1, or [least, most]")
        return self

    @property
    def least(self) -> int:
        return self.count if isinstance(self.count, int) else self.count[0]

    @property
    def most(self) -> int:
        return self.count if isinstance(self.count, int) else self.count[1]


class CheckpointsSection(Section):
    """every: steps; null: at the end alone. keep: how many, the best by the evaluation's loss if there is one, else
    the latest; the latest is always there."""

    every: int | None = Field(default=None, ge=1)
    keep: int = Field(default=2, ge=1)


class EvaluationSection(Section):
    """Before the first step, and with each checkpoint. streams: how many. segment: the policy it runs under, if it
    isn't that of training: so is measured what training under one policy is worth to another."""

    data: DataConfig
    streams: int = Field(default=16, ge=1)
    segment: SegmentSection | None = None


class MetricsSection(Section):
    """TensorBoard always, and these if asked for. every: steps between lines."""

    every: int = Field(default=1, ge=1)
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()

    @model_validator(mode="after")
    def _installed(self) -> MetricsSection:
        if missing := [name for name in self.trackers if importlib.util.find_spec(name) is None]:
            raise ValueError(f"{', '.join(missing)} isn't installed")
        return self


class TrainConfig(Section):
    """A run.

    name: its folder in `storage`, which every node must see. k: how many segments back gradients reach, or "all".
    chunk_tokens, checkpoint_layers: as `SegmentedTrainer` has them. graphs: on a GPU, passes are played as graphs.
    past_bytes: budget of a stream's past KV. balance: in a step's loss targets count alike, or streams do, whether they
    have few targets or many. device_bytes: what a worker may take on its device; null: what is free there. lora: an
    adapter is trained; null: all weights are, unless `freeze` leaves the selectors alone to learn. adapter: a directory
    that training begins with; with `freeze` it stays as it is, and selectors learn. gates: are trained, alone.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str = DEFAULT_MODEL
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    segment: SegmentSection = SegmentSection()
    k: Annotated[int, Field(ge=0)] | Literal["all"] = 1
    chunk_tokens: int = Field(default=1024, ge=1)
    checkpoint_layers: bool = True
    graphs: bool = True
    past_bytes: int = Field(default=8 * GIB, ge=0)
    device_bytes: int | None = Field(default=None, ge=1)
    seed: int = 0
    steps: int = Field(ge=1)
    data: DataConfig
    lora: LoraSection | None = None
    selectors: SelectorsSection | None = None
    freeze: bool = False
    adapter: Where | None = None
    gates: GatesSection | None = None
    balance: Literal["targets", "streams"] = "targets"
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    workers: WorkersSection = WorkersSection()
    checkpoints: CheckpointsSection = CheckpointsSection()
    evaluation: EvaluationSection | None = None
    metrics: MetricsSection = MetricsSection()
    storage: Where = Field(default=Path("runs"), validate_default=True)

    @field_validator("segment", "evaluation")
    @classmethod
    def _possible(cls, section: Any, info: ValidationInfo) -> Any:
        """A policy that can't be is told now, rather than by a worker."""
        segment = section.segment if isinstance(section, EvaluationSection) else section
        if segment is not None and "model" in info.data:
            try:
                segment.config(info.data["model"])
            except ConfigError as error:
                raise ValueError(error.message) from error
        return section

    @field_validator("selectors")
    @classmethod
    def _selectors_there(cls, section: SelectorsSection | None, info: ValidationInfo) -> SelectorsSection | None:
        if section is not None and {"model", "segment"} <= info.data.keys():
            segment = info.data["segment"].config(info.data["model"])
            if not isinstance(segment, SegmentedConfig) or not segment.selectors:
                raise ValueError("they learn under policy 'segmented' with selectors, and not with selection 'cell'")
        return section

    @field_validator("freeze")
    @classmethod
    def _something_learns(cls, freeze: bool, info: ValidationInfo) -> bool:
        if freeze and not (info.data.get("lora") or info.data.get("selectors")):
            raise ValueError("nothing would be trained; add selectors, or lora")
        return freeze

    @field_validator("adapter")
    @classmethod
    def _adapter_has_a_use(cls, adapter: Path | None, info: ValidationInfo) -> Path | None:
        if adapter is not None and not (info.data.get("lora") or info.data.get("freeze")):
            raise ValueError("it is trained further with lora, or kept with freeze: set one of them")
        return adapter

    @model_validator(mode="after")
    def _keeps_the_model(self) -> TrainConfig:
        sources = [*self.data.sources, *(self.evaluation.data.sources if self.evaluation else ())]
        if self.whole and any(source.loss == "own" for source in sources):
            raise ValueError('data: loss "own" is of an adapter, without which the model stays as it is: add lora')
        return self

    @field_validator("gates")
    @classmethod
    def _gates_alone(cls, gates: GatesSection | None, info: ValidationInfo) -> GatesSection | None:
        if gates is not None and any(info.data.get(other) for other in ("lora", "selectors", "freeze", "adapter")):
            raise ValueError("they are trained alone: without lora, selectors, freeze or adapter")
        of = info.data["segment"].config(info.data["model"]) if {"model", "segment"} <= info.data.keys() else None
        if gates is not None and of is not None and not isinstance(of, DuoConfig):
            raise ValueError("they are of policy duo: set segment: {policy: duo}")
        return gates

    @field_validator("workers")
    @classmethod
    def _streams_for_all(cls, workers: WorkersSection, info: ValidationInfo) -> WorkersSection:
        if "data" in info.data and workers.most > (streams := info.data["data"].streams_per_step):
            raise ValueError(f"{workers.most} workers would share data.streams_per_step={streams}: set that higher")
        return workers

    @field_validator("evaluation")
    @classmethod
    def _gates_have_a_policy(cls, section: EvaluationSection | None, info: ValidationInfo) -> EvaluationSection | None:
        if info.data.get("gates") and section is not None and section.segment is not None:
            raise ValueError("gates are evaluated as policy duo with the cells that they choose: no segment here")
        return section

    @property
    def whole(self) -> bool:
        """Whether the model's own weights are trained, rather than something beside them."""
        return self.lora is None and not self.freeze and self.gates is None

    @classmethod
    def read(cls, path: Path) -> TrainConfig:
        """Read a YAML file. Raises ConfigError that tells each fault with its line."""
        config = read_config(path, cls)
        local = Path(config.model)
        if not local.is_absolute() and (path.parent / local).exists():
            return config.model_copy(update={"model": str((path.parent / local).resolve())})
        return config

    def segment_config(self) -> SegmentConfig:
        """The policy that is trained."""
        return self.segment.config(self.model)

    def evaluation_segment(self) -> SegmentConfig:
        """The policy that evaluation runs, which is the one to serve with."""
        own = self.evaluation.segment if self.evaluation is not None else None
        return self.segment_config() if own is None else own.config(self.model)

    def to_json(self) -> str:
        """What was set, with all paths absolute, for another process; `model_validate_json` reads it."""
        return self.model_copy(update={"storage": self.storage}).model_dump_json(exclude_unset=True)

    @property
    def folder(self) -> Path:
        return self.storage / self.name

    @property
    def digests(self) -> dict[str, str]:
        """A hash of each part that the curve depends on, by its key."""
        parts = {name: value for name, value in self.model_dump(mode="json").items() if name not in FREE}
        return {name: _digest(value) for name, value in parts.items()}

    @property
    def digest(self) -> str:
        return _digest(self.digests)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=10).hexdigest()
