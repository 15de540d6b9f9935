"""RULER's tasks by name, as tasks of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from segcore.errors import ConfigError
from segcore.tasks.base import Item, Turn
from services.evaluation.config import EvalConfig, TaskSection
from services.evaluation.tasks.base import Asking, Case, Frame
from services.evaluation.tasks.ruler.base import Count, Maker, Sample
from services.evaluation.tasks.ruler.counting import CommonWords, FrequentWords
from services.evaluation.tasks.ruler.needles import Needles, Niah
from services.evaluation.tasks.ruler.questions import Questions
from services.evaluation.tasks.ruler.tracking import VariableTracking

MAKERS: dict[str, Callable[[int, Count], Maker]] = {
    "niah_single_1": lambda length, count: Niah(Needles("repeat"), length, count),
    "niah_single_2": lambda length, count: Niah(Needles("essay"), length, count),
    "niah_single_3": lambda length, count: Niah(Needles("essay", value="uuids"), length, count),
    "niah_multikey_1": lambda length, count: Niah(Needles("essay", keys=4), length, count),
    "niah_multikey_2": lambda length, count: Niah(Needles("needle"), length, count),
    "niah_multikey_3": lambda length, count: Niah(Needles("needle", key="uuids", value="uuids"), length, count),
    "niah_multivalue": lambda length, count: Niah(Needles("essay", values=4), length, count),
    "niah_multiquery": lambda length, count: Niah(Needles("essay", queries=4), length, count),
    "vt": VariableTracking,
    "cwe": CommonWords,
    "fwe": FrequentWords,
    "qa_1": lambda length, count: Questions("squad", length, count),
    "qa_2": lambda length, count: Questions("hotpotqa", length, count),
}


class Ruler(Asking):
    """One of RULER's tasks. Its lengths count the prompt and RULER's allowance for the answer, not the chat frame."""

    def __init__(self, section: TaskSection, config: EvalConfig) -> None:
        super().__init__(section, config)
        if not section.lengths or section.depths or section.options:
            raise ConfigError(f"task {section.name!r}: RULER's tasks take lengths, items and lead")
        self._made: dict[int, tuple[Iterator[Sample], list[Sample]]] = {}

    def cases(self) -> list[Case]:
        return self.grid()

    def item(self, case: Case, frame: Frame) -> Item:
        maker = MAKERS[self.section.task](case.length, frame.count)
        source, made = self._made.setdefault(case.length, (maker.samples(), []))
        made += islice(source, max(0, case.number + 1 - len(made)))
        sample = made[case.number]
        turn = Turn(
            question=sample.question,
            answer=", ".join(sample.answers),
            expected=tuple(sample.answers),
            lead=sample.lead.strip(),
            match=maker.match,
        )
        name = f"{self.section.task} {case.length} {case.number}"
        return Item(name=name, task=self.section.task, document=sample.document.strip(), turns=(turn,))
