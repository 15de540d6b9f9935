"""LongBench and LongBench-E (arXiv 2308.14508): 21 data sets in one format, a file of JSON lines each."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field

from segcore.errors import ConfigError
from services.evaluation.config import EvalConfig, TaskSection
from services.evaluation.scores import (
    best,
    chinese_f1,
    chinese_rouge_l,
    edit_similarity,
    rouge_l,
    word_f1,
)
from services.evaluation.tasks.benchmarks.base import Benchmark, Prompt, definitions, parted
from services.evaluation.tasks.benchmarks.rows import Row

# LongBench-E's scores are told for three ranges of words, by where they end; the last has no end.
RANGES = (4000, 8000)
LONGEST = 16000


class LongBenchRow(Row):
    """length: in words, or characters of Chinese. all_classes: of classification; None elsewhere."""

    input: str
    context: str
    answers: list[str] = Field(min_length=1)
    length: int
    dataset: str
    all_classes: list[str] | None = None


class LongBench(Benchmark[LongBenchRow]):
    """A file of LongBench; of LongBench-E, if its name ends so ("qasper_e.jsonl")."""

    row = LongBenchRow

    def __init__(self, section: TaskSection, config: EvalConfig) -> None:
        super().__init__(section, config)
        self._even = self.path.stem.endswith("_e")
        names = {row.dataset.removesuffix("_e") for row in self.rows}
        if len(names) > 1 or not names <= definitions("longbench").keys():
            known = ", ".join(definitions("longbench"))
            raise ConfigError(f"{self.path}: data set {', '.join(sorted(names))}; a file has one of {known}")
        self._is = definitions("longbench")[names.pop()]
        self.metric = self._is["judged"]
        if self.metric == "class" and any(row.all_classes is None for row in self.rows):
            raise ConfigError(f"{self.path}: rows of classification need all_classes")
        for number, row in enumerate(self.rows, 1):
            if self.metric == "number" and not all(re.search(r"\d", text) for text in row.answers):
                raise ConfigError(f"{self.path}: row {number} has no number to expect")

    @property
    def max_tokens(self) -> int:
        return self.section.max_tokens or int(self._is["max_tokens"])

    def length(self, row: LongBenchRow) -> int:
        return next((end for end in RANGES if row.length < end), LONGEST) if self._even else 0

    def facts(self, row: LongBenchRow) -> dict[str, Any]:
        return {"dataset": row.dataset, "words": row.length}

    def prompt(self, row: LongBenchRow) -> Prompt:
        return parted(self._is["prompt"], row.context, input=row.input)

    def expected(self, row: LongBenchRow) -> list[str]:
        return row.answers

    def judge(self, row: LongBenchRow, answer: str) -> dict[str, float]:
        if self._is.get("first_line"):
            answer = answer.lstrip("\n").split("\n")[0]
        match self.metric:
            case "class":
                score = best(lambda a, b: class_share(a, b, row.all_classes or []), answer, row.answers)
            case "number":
                score = best(number_share, answer, row.answers)
            case "code":
                score = best(edit_similarity, first_code_line(answer), row.answers)
            case metric:
                score = best(_PAIRS[metric], answer, row.answers)
        return {self.metric: score}


_PAIRS = {"word_f1": word_f1, "chinese_f1": chinese_f1, "rouge_l": rouge_l, "chinese_rouge_l": chinese_rouge_l}


def class_share(answer: str, expected: str, classes: list[str]) -> float:
    """One, shared among all the classes that the answer names, if the right one is among them; a class whose name is
    a part of the right one's doesn't count."""
    named = [name for name in classes if name in answer and (name == expected or name not in expected)]
    return 1 / len(named) if expected in named else 0.0


def number_share(answer: str, expected: str) -> float:
    """The share of the answer's numbers that are the expected one: "7", "Paragraph 7" or "段落7"."""
    wanted, found = re.findall(r"\d+", expected)[0], re.findall(r"\d+", answer)
    return found.count(wanted) / len(found) if found else 0.0


def first_code_line(answer: str) -> str:
    """The first line that is neither a fence nor a comment; "" if there is none."""
    lines = answer.lstrip("\n").split("\n")
    return next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
