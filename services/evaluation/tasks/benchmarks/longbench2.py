"""LongBench v2 (arXiv 2412.15204): questions with four choices, a JSON array in one file."""

from __future__ import annotations

import re
from typing import Any, Literal

from services.evaluation.tasks.benchmarks.base import Benchmark, Prompt, parted
from services.evaluation.tasks.benchmarks.rows import Row

# https://github.com/THUDM/LongBench, prompts/0shot.txt, MIT licence.
PROMPT = """Please read the following text and answer the question below.

<text>
{context}
</text>

What is the correct answer to this question: {question}
Choices:
(A) {A}
(B) {B}
(C) {C}
(D) {D}

Format your response as follows: "The correct answer is (insert answer here)".
"""
# Words of a text, at most; of the longest there are up to two million.
WORDS = {"short": 32_000, "medium": 128_000, "long": 2_000_000}


class LongBench2Row(Row):
    domain: str
    difficulty: str
    length: Literal["short", "medium", "long"]
    question: str
    choice_A: str
    choice_B: str
    choice_C: str
    choice_D: str
    answer: Literal["A", "B", "C", "D"]
    context: str


class LongBench2(Benchmark[LongBench2Row]):
    """Scores are told for the three lengths, by how many words they have at most."""

    row = LongBench2Row
    metric = "accuracy"

    @property
    def max_tokens(self) -> int:
        return self.section.max_tokens or 128

    def length(self, row: LongBench2Row) -> int:
        return WORDS[row.length]

    def facts(self, row: LongBench2Row) -> dict[str, Any]:
        return {"domain": row.domain, "difficulty": row.difficulty}

    def prompt(self, row: LongBench2Row) -> Prompt:
        choices = {"A": row.choice_A, "B": row.choice_B, "C": row.choice_C, "D": row.choice_D}
        return parted(PROMPT, row.context.strip(), question=row.question.strip(), **choices)

    def expected(self, row: LongBench2Row) -> list[str]:
        return [row.answer]

    def judge(self, row: LongBench2Row, answer: str) -> dict[str, float]:
        said = re.search(r"The correct answer is \(?([A-D])", answer.replace("*", ""))
        return {"accuracy": float(said is not None and said[1] == row.answer)}
