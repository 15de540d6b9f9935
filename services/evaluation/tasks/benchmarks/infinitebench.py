"""InfiniteBench (arXiv 2402.13718): twelve tasks of 100K tokens and more, a file of JSON lines each."""

from __future__ import annotations

import re
from collections.abc import Callable

from pydantic import field_validator

from segcore.errors import ConfigError
from services.evaluation.config import EvalConfig, TaskSection
from services.evaluation.scores import best, chinese_bare, overlap, rouge_l_sum, word_f1
from services.evaluation.tasks.benchmarks.base import Benchmark, Prompt, definitions, parted
from services.evaluation.tasks.benchmarks.rows import Row

LETTERS = "ABCD"
Label = str | int | float


class InfiniteBenchRow(Row):
    """answer: right answers, one of which is enough; of `math_calc`, the numbers in a row. options: of a choice."""

    context: str
    input: str
    answer: list[Label]
    options: tuple[str, ...] = ()

    @field_validator("answer", mode="before")
    @classmethod
    def _listed(cls, given: object) -> object:
        """Published as one value, as a list of them, or as a list in a list."""
        if isinstance(given, list) and len(given) == 1 and isinstance(given[0], list):
            return given[0]
        return given if isinstance(given, list) else [given]

    @field_validator("answer")
    @classmethod
    def _some(cls, given: list[Label]) -> list[Label]:
        if not given:
            raise ValueError("there must be an answer")
        return given


class InfiniteBench(Benchmark[InfiniteBenchRow]):
    """subset: the task; default: the file's name without its ending. Prompts are those for GPT-4."""

    row = InfiniteBenchRow
    metric = "score"
    own_options = frozenset({"subset"})

    def __init__(self, section: TaskSection, config: EvalConfig) -> None:
        super().__init__(section, config)
        self._subset = str(section.options.get("subset", self.path.stem))
        if self._subset not in definitions("infinitebench"):
            known = ", ".join(definitions("infinitebench"))
            raise ConfigError(f"{self.path}: subset {self._subset!r}; known: {known}; name it, or the file")
        self._is = definitions("infinitebench")[self._subset]
        if "{A}" in self._is["prompt"]:
            for number, row in enumerate(self.rows, 1):
                if len(row.options) != len(LETTERS) or row.answer[0] not in row.options:
                    raise ConfigError(f"{self.path}: row {number} needs four options, the answer among them")

    @property
    def max_tokens(self) -> int:
        return self.section.max_tokens or int(self._is["max_tokens"])

    def prompt(self, row: InfiniteBenchRow) -> Prompt:
        values = dict(zip(LETTERS, row.options, strict=False)) | {"input": row.input}
        if self._subset == "code_run":
            call = re.search(r"(func_[0-9]+)\(-?[0-9]+\)", row.input)
            values |= {"func": call[1], "func_call": call[0]} if call else {"func": "", "func_call": row.input}
        if self._subset == "math_find":
            number = re.search(r"The .+(?= of)", row.input)
            values["prefix"] = f"What is {number[0].lower()} in the following list?" if number else row.input
        return parted(self._is["prompt"], row.context, **values)

    def expected(self, row: InfiniteBenchRow) -> list[str]:
        return [str(label) for label in row.answer]

    def judge(self, row: InfiniteBenchRow, answer: str) -> dict[str, float]:
        return {"score": float(JUDGES[self._subset](answer.strip(), row))}


def key_value(answer: str, row: InfiniteBenchRow) -> bool:
    return row.answer[0] in _split(answer, "\n:\"'.,?!{}")


def first_number(answer: str, row: InfiniteBenchRow) -> bool:
    found = re.search(r"[0-9]+", answer)
    return found is not None and found[0] == str(row.answer[0])


def last_word_is(answer: str, row: InfiniteBenchRow) -> bool:
    words = _split(answer, "\n.`'\":")
    return bool(words) and re.fullmatch(r"[+-]?\d+", words[-1]) is not None and int(words[-1]) == int(row.answer[0])


def quantity(answer: str, row: InfiniteBenchRow) -> bool:
    found = re.search(r"\d+\.\d+|\d+", answer)
    return found is not None and float(found[0]) == float(row.answer[0])


def running_values(answer: str, row: InfiniteBenchRow) -> float:
    """The share of the values that are right before the first wrong one."""
    found = [int(number) for number in re.findall(r"[0-9]+", answer)]
    right = [a == b for a, b in zip(found, row.answer, strict=False)]
    return (right.index(False) if False in right else len(right)) / len(row.answer)


def speaker(answer: str, row: InfiniteBenchRow) -> bool:
    return row.answer[0] in [word.upper() for word in _split(answer, "\n:\"'.,?!{}")]


def faulty_function(answer: str, row: InfiniteBenchRow) -> bool:
    letter = _letter(row)
    if answer[:2] in (f"{letter}.", f"{letter}:"):
        return True
    plain = " ".join(re.sub(r"[\n`'\"*-]|[Oo]ption", " ", answer).split())
    said = _after(plain, ("answer is:", "is:", "answer:"))
    return said is not None and said.startswith((letter, str(row.answer[0])))


def choice(answer: str, row: InfiniteBenchRow) -> bool:
    letter, text = _letter(row), str(row.answer[0])
    if answer[:1] and answer[0] in LETTERS:
        return answer[0] == letter
    if answer == text:
        return True
    plain = " ".join(_split(answer, "\n\"'.,?!{}"))
    said = _after(plain, ("answer is:", "answer:", "answer is", "option is"))
    if said is not None:
        return said.startswith((letter, text))
    return next((word for word in plain.split() if word in LETTERS), None) == letter


def book_answer(answer: str, row: InfiniteBenchRow) -> float:
    return best(word_f1, answer, [str(label) for label in row.answer])


def chinese_book_answer(answer: str, row: InfiniteBenchRow) -> float:
    """By characters."""
    return best(lambda a, b: overlap(chinese_bare(a), chinese_bare(b)), answer, [str(label) for label in row.answer])


def summary(answer: str, row: InfiniteBenchRow) -> float:
    return best(rouge_l_sum, answer, [str(label) for label in row.answer])


JUDGES: dict[str, Callable[[str, InfiniteBenchRow], float]] = {
    "passkey": first_number,
    "number_string": first_number,
    "kv_retrieval": key_value,
    "longbook_sum_eng": summary,
    "longbook_choice_eng": choice,
    "longbook_qa_eng": book_answer,
    "longbook_qa_chn": chinese_book_answer,
    "longdialogue_qa_eng": speaker,
    "math_find": quantity,
    "math_calc": running_values,
    "code_run": last_word_is,
    "code_debug": faulty_function,
}


def _letter(row: InfiniteBenchRow) -> str:
    return LETTERS[row.options.index(str(row.answer[0]))]


def _split(text: str, marks: str) -> list[str]:
    """Words, where these marks part them too."""
    return text.translate(dict.fromkeys(map(ord, marks), " ")).split()


def _after(text: str, beginnings: tuple[str, ...]) -> str | None:
    """What follows the first of these that occurs, and a space."""
    for beginning in beginnings:
        _, found, rest = text.partition(beginning)
        if found:
            return rest[1:]
    return None
