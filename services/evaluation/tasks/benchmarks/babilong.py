"""BABILong (arXiv 2406.10149): facts of bAbI's tasks hidden in books; a JSON array for each task and length."""

from __future__ import annotations

import re

from segcore.errors import ConfigError
from services.evaluation.config import EvalConfig, TaskSection
from services.evaluation.tasks.benchmarks.base import Benchmark, Prompt, definitions, parted
from services.evaluation.tasks.benchmarks.rows import Row

PROMPT = "{instruction}\n\n{examples}\n\n{post_prompt}\n\n<context>\n{context}\n</context>\n\nQuestion: {question}"
TOKENS = {"k": 1_000, "M": 1_000_000}


class BabiLongRow(Row):
    input: str
    question: str
    target: str


class BabiLong(Benchmark[BabiLongRow]):
    """data: such as qa1/16k.json, whose name is the length. subset: the task; default: the folder's name."""

    row = BabiLongRow
    metric = "accuracy"
    own_options = frozenset({"subset"})

    def __init__(self, section: TaskSection, config: EvalConfig) -> None:
        super().__init__(section, config)
        subset = section.options.get("subset", self.path.parent.name)
        if subset not in definitions("babilong"):
            raise ConfigError(
                f"{self.path}: subset {subset!r}; known: {', '.join(definitions('babilong'))}; name it, or the folder"
            )
        self._is = definitions("babilong")[subset]
        size = re.fullmatch(r"(\d+)([kM])", self.path.stem)
        self._length = int(size[1]) * TOKENS[size[2]] if size else 0

    @property
    def max_tokens(self) -> int:
        return self.section.max_tokens or 20

    def length(self, row: BabiLongRow) -> int:
        return self._length

    def prompt(self, row: BabiLongRow) -> Prompt:
        parts = {name: self._is[name] for name in ("instruction", "examples", "post_prompt")}
        return parted(PROMPT, row.input.strip(), question=row.question, **parts)

    def expected(self, row: BabiLongRow) -> list[str]:
        return [row.target]

    def judge(self, row: BabiLongRow, answer: str) -> dict[str, float]:
        return {"accuracy": float(names_target_alone(answer, row.target, row.question, self._is["labels"]))}


def names_target_alone(answer: str, target: str, question: str, labels: list[str]) -> bool:
    """Whether the answer's first sentence names what is asked for, and nothing else that could be; what the question
    names can't be. A target may be several, "apple,milk"."""
    first = re.split(r"\.|<context>|<example>|question", answer.lower())[0]
    known = {label.lower() for label in labels if label.lower() not in question.lower()}
    return {label for label in known if label in first} == set(target.lower().split(","))
