"""What the benchmarks have in common: rows of a file become items, and answers are judged as the benchmark does."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Generic, NamedTuple

import yaml

from segcore.errors import ConfigError
from segcore.tasks.base import Item, Turn
from services.evaluation.config import EvalConfig, TaskSection
from services.evaluation.tasks.base import Asking, Case, Frame
from services.evaluation.tasks.benchmarks.rows import R, read_rows


class Prompt(NamedTuple):
    """A row as it is put: the document, and what is asked after it."""

    document: str
    question: str


class Benchmark(Asking, Generic[R]):
    """data: the file. items: so many of its rows, from the first; all, unless the configuration says."""

    row: type[R]
    # Names of options beside `data`.
    own_options: frozenset[str] = frozenset()

    def __init__(self, section: TaskSection, config: EvalConfig) -> None:
        super().__init__(section, config)
        options = section.options
        if "data" not in options or options.keys() - self.own_options - {"data"} or section.lengths or section.depths:
            known = ", ".join(["data", *sorted(self.own_options), "items", "max_tokens"])
            raise ConfigError(f"task {section.name!r}: {section.task} takes {known}")
        self.path = Path(options["data"])
        self.rows, self._digest = read_rows(self.path, self.row)

    @abstractmethod
    def prompt(self, row: R) -> Prompt:
        """How it is asked."""

    @abstractmethod
    def expected(self, row: R) -> list[str]:
        """Right answers, one of which is enough; for people to read."""

    @abstractmethod
    def judge(self, row: R, answer: str) -> dict[str, float]:
        """A score by its metric's name."""

    def length(self, row: R) -> int:
        """A length by which the benchmark reports its scores; 0: none."""
        return 0

    def facts(self, row: R) -> dict[str, Any]:
        """What else it may be told apart by."""
        return {}

    def cases(self) -> list[Case]:
        rows = self.rows[: self.section.items]
        return [Case(self.section.name, self.length(row), None, number) for number, row in enumerate(rows)]

    def item(self, case: Case, frame: Frame) -> Item:
        row = self.rows[case.number]
        asked, expected = self.prompt(row), tuple(self.expected(row))
        turn = Turn(question=asked.question, answer=expected[0], expected=expected, match="any")
        name = f"{self.path.name} {case.number}"
        return Item(name=name, task=self.section.task, document=asked.document, turns=(turn,), facts=self.facts(row))

    def document(self, case: Case) -> str:
        text = self.prompt(self.rows[case.number]).document
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def scores(self, case: Case, turn: Turn, answer: str) -> dict[str, float]:
        return self.judge(self.rows[case.number], answer)

    @property
    def digest(self) -> str:
        return self._digest


def parted(template: str, context: str, **values: str) -> Prompt:
    """A template's text, parted where its {context} ends. What is asked only before it is asked again after it, for a
    question there must be."""
    before, after = (part.format(**values) for part in template.split("{context}"))
    return Prompt(before + context, after.strip() or before.strip())


@lru_cache
def definitions(name: str) -> dict[str, dict[str, Any]]:
    """What lies beside this module as YAML."""
    text = resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))
