"""What a configuration file says of the data that are trained on. No torch here: a command reads files at once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from segcore.errors import ConfigError
from segcore.tasks.registry import draw_task


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    """Relative paths are relative to the file that names them."""
    folder: Path = (info.context or {}).get("folder", Path.cwd())
    return folder / path.expanduser()


Where = Annotated[Path, AfterValidator(_beside_the_file)]


class Section(BaseModel):
    """A mapping of the file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TaskConfig(Section):
    """A task of `segcore.tasks` and its options; of an option that lists values, each item draws one."""

    model_config = ConfigDict(extra="allow", frozen=True)

    task: str
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _possible(self) -> TaskConfig:
        try:
            draw_task(self.task, self.options, random.Random(0))
        except ConfigError as error:
            raise ValueError(error.message) from error
        return self

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class SourceConfig(Section):
    """Files, or tasks.

    files: text (a file is a document), JSON lines, Parquet, folders of these, and data sets that `datasets` saved.
    weight: how many of the streams come from here, relative to the other sources. loss: "all" tokens, "answers"
    alone; or, of tasks, what answers must hold, their "values", or all but answers by what the model would say itself,
    its "own"; None: all of documents, answers of the rest.

    Of files: text: the field that is a document. messages: the field that is a conversation. prompt: fields of the
    user's turn, and answer, the field of the answer to it. The first of these that is set says what records are; none:
    documents in "text". most_chars: longer documents are cut into several streams; longer conversations are left out.

    Of tasks: lengths: tokens of a stream, of which each item draws one. haystack: "python", "essays", "hotpotqa", or a
    text file or folder, of which the part for training is used. split: of its names, values and texts.
    """

    files: tuple[Where, ...] = ()
    tasks: tuple[TaskConfig, ...] = ()
    weight: float = Field(default=1.0, gt=0)
    loss: Literal["all", "answers", "values", "own"] | None = None
    text: str | None = None
    messages: str | None = None
    prompt: tuple[str, ...] = ()
    answer: str | None = None
    most_chars: int | None = Field(default=None, ge=16)
    lengths: tuple[int, ...] = (4096,)
    haystack: str = "python"
    split: Literal["train", "eval"] = "train"

    @model_validator(mode="after")
    def _one_kind(self) -> SourceConfig:
        if bool(self.files) == bool(self.tasks):
            raise ValueError("a source has files or tasks")
        if bool(self.prompt) != bool(self.answer):
            raise ValueError("prompt and answer go together")
        if sum(map(bool, (self.text, self.messages, self.prompt))) > 1:
            raise ValueError("records are documents (text), conversations (messages) or instructions (prompt, answer)")
        only = (
            {"text", "messages", "prompt", "answer", "most_chars"} if self.tasks else {"lengths", "haystack", "split"}
        )
        if wrong := only & self.model_fields_set:
            raise ValueError(f"{', '.join(sorted(wrong))}: not of {'tasks' if self.tasks else 'files'}")
        if self.loss in ("values", "own") and not self.tasks:
            raise ValueError(f'loss: "{self.loss}" is of tasks, whose answers are known to the word')
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError("lengths must be at least 1")
        return self


class DataConfig(Section):
    """Sources, mixed.

    streams_per_step: of all workers together. bucket_steps: so many steps' streams are sorted by length before they are
    dealt out, so that those of a step are about as long; 1: no bucketing. shuffle: else, files in their order.
    """

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    streams_per_step: int = Field(default=8, ge=1)
    bucket_steps: int = Field(default=16, ge=1)
    shuffle: bool = True
    seed: int = 0
