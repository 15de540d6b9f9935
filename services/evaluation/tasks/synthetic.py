"""Tasks of `segcore.tasks`, by their names there."""

from __future__ import annotations

from segcore.errors import ConfigError
from segcore.tasks.base import Item, Room, Task
from segcore.tasks.haystack import Haystack
from segcore.tasks.questions import Questions
from segcore.tasks.registry import make_task
from services.evaluation.config import EvalConfig, TaskSection
from services.evaluation.tasks.base import Asking, Case, Frame


def haystack_of(config: EvalConfig) -> Haystack:
    """The text that an evaluation may use."""
    whole = Haystack.named(config.haystack)
    return whole.part("eval") if config.haystack_part == "eval" else whole


class Synthetic(Asking):
    """depths: of what is asked for, where a task has such an option."""

    def __init__(self, section: TaskSection, config: EvalConfig) -> None:
        super().__init__(section, config)
        if not section.lengths:
            raise ConfigError(f"task {section.name!r}: say of what lengths")
        self._haystack = haystack_of(config)
        task = self._task(section.depths[0] if section.depths else None)
        self._digest = task.digest("eval") if isinstance(task, Questions) else self._haystack.digest

    def cases(self) -> list[Case]:
        return self.grid()

    def item(self, case: Case, frame: Frame) -> Item:
        room = Room(
            split="eval",
            # The answer takes what it may, not what a right one would.
            length=case.length - self.max_tokens,
            haystack=self._haystack,
            count=frame.count,
            frame_tokens=frame.frame_tokens,
            turn_tokens=frame.turn_tokens,
        )
        return self._task(case.depth).make(room, f"{self.config.seed} {case.number}")

    @property
    def digest(self) -> str:
        return self._digest

    def _task(self, depth: float | None) -> Task:
        options = self.section.options | ({} if depth is None else {"depth": depth})
        return make_task(self.section.task, **options)
