"""What results say: means with intervals, comparisons of arms on the same items, and figures of time and memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segcore.config import MIB
from segcore.errors import NotFound
from services.evaluation.config import EvalConfig
from services.evaluation.measures import SHARE, Measure
from services.evaluation.results import Result, read_results
from services.evaluation.run import RESULTS, SETTINGS
from services.evaluation.tasks.registry import SUITES

RESAMPLES = 2000
# Of fewer items even unanimous ones can't say at 95% that one arm is better.
PAIRS = 6
# Of an answer's figures, those that are told by arm and length: the unit of pictures, and how much of it one is.
FIGURES = {
    "prefill_s": ("seconds", 1),
    "prefill_tokens_per_s": ("tokens/s", 1),
    "first_token_s": ("seconds", 1),
    "answer_tokens_per_s": ("tokens/s", 1),
    "device_bytes": ("MiB", MIB),
    "past_bytes_per_token": ("bytes", 1),
    "recall": ("share", 1),
}


class Interval(NamedTuple):
    """A mean, and where 95% of bootstrap resamples have it."""

    mean: float
    low: float
    high: float
    items: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of at least one value; the same values always have the same interval."""
        sample = np.asarray(values, dtype=float)
        drawn = np.random.default_rng(0).integers(len(sample), size=(RESAMPLES, len(sample)))
        low, high = np.quantile(sample[drawn].mean(axis=1), [0.025, 0.975])
        return cls(float(sample.mean()), float(low), float(high), len(sample))


@dataclass(frozen=True)
class Summary:
    """A run's results, to be asked for what is wanted of them."""

    config: EvalConfig
    results: list[Result]
    planned: int
    run_id: str
    code: str = ""
    data: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Summary:
        """Raises NotFound, ConfigError."""
        try:
            settings = json.loads((folder / SETTINGS).read_text())
        except (OSError, ValueError) as error:
            raise NotFound(f"{folder} isn't an evaluation's folder: {error}") from error
        if not settings.keys() >= {"run", "code", "planned", "data", "config"}:
            raise NotFound(f"{folder} is an evaluation of another version of segcore: run it again")
        config = EvalConfig.model_validate(settings["config"])
        found = list(read_results(folder / RESULTS).values())
        return cls(config, found, settings["planned"], settings["run"], settings["code"], settings["data"])

    @property
    def arms(self) -> list[str]:
        return [arm.name for arm in self.config.arms]

    @property
    def tasks(self) -> list[str]:
        return [task.name for task in self.config.tasks]

    def measure(self, task: str) -> Measure:
        """What a task's scores are."""
        return SUITES[next(section.task for section in self.config.tasks if section.name == task)].measure

    @property
    def counts(self) -> dict[str, int]:
        """planned = scored + failed + left, always."""
        scored = sum("score" in result for result in self.results)
        failed = len(self.results) - scored
        return {"planned": self.planned, "scored": scored, "failed": failed, "left": self.planned - len(self.results)}

    def of(self, **wanted: Any) -> list[Result]:
        """Results whose fields are as given; None and absent alike."""
        return [r for r in self.results if all(r.get(name) == value for name, value in wanted.items())]

    def lengths(self, task: str) -> list[int]:
        return sorted({result["length"] for result in self.of(task=task)})

    @property
    def all_lengths(self) -> list[int]:
        return sorted({length for task in self.tasks for length in self.lengths(task)})

    def depths(self, task: str) -> list[float]:
        return sorted({result["depth"] for result in self.of(task=task) if result["depth"] is not None})

    def score(self, **wanted: Any) -> Interval | None:
        """The mean score of what was scored; None if nothing was."""
        scores = [result["score"] for result in self.of(**wanted) if "score" in result]
        return Interval.of(scores) if scores else None

    def failures(self, **wanted: Any) -> dict[str, int]:
        """What was not scored, by the kind of error."""
        kinds = [result["error"]["kind"] for result in self.of(**wanted) if "error" in result]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    def truncated(self, **wanted: Any) -> int:
        return sum(any(turn.get("truncated") for turn in result.get("turns", ())) for result in self.of(**wanted))

    def figure(self, name: str, **wanted: Any) -> float | None:
        """The median of one of FIGURES; None where it isn't known."""
        turns = [turn for result in self.of(**wanted) for turn in result.get("turns", ())]
        values = [value for turn in turns if (value := _FIGURES[name](turn)) is not None]
        return float(np.mean(values) if name == "recall" else np.median(values)) if values else None

    def perplexities(self, task: str, arm: str) -> dict[int, float]:
        """By the position where a bucket begins; empty for tasks that have none."""
        sums: dict[int, list[float]] = {}
        for result in self.of(task=task, arm=arm):
            for first, (loss, count) in result.get("nats", {}).items():
                bucket = sums.setdefault(int(first), [0.0, 0.0])
                bucket[0] += loss
                bucket[1] += count
        return {first: math.exp(loss / count) for first, (loss, count) in sorted(sums.items())}

    def agreement(self, arm: str, other: str, **wanted: Any) -> float | None:
        """The share of items to which two arms give the same answers, word for word."""
        both = paired(self.of(arm=arm, **wanted), self.of(arm=other, **wanted))
        same = [_texts(a) == _texts(b) for a, b in both if "turns" in a]
        return sum(same) / len(same) if same else None

    def best(self, task: str, **wanted: Any) -> str | None:
        """The arm that is better than every other on the same items, as far as intervals say so."""
        lower = self.measure(task).lower_is_better
        results = {arm: self.of(arm=arm, task=task, **wanted) for arm in self.arms}
        for arm in self.arms:
            others = [difference(results[arm], results[other]) for other in self.arms if other != arm]
            if others and all(found and found.items >= PAIRS and _above(found, lower) for found in others):
                return arm
        return None

    def _shown(self, score: Interval | None, task: str) -> dict[str, float] | None:
        """A share as it is, a perplexity as itself."""
        if score is None or self.measure(task) is SHARE:
            return score and score._asdict()
        value = self.measure(task).value
        return Interval(value(score.mean), value(score.low), value(score.high), score.items)._asdict()

    def as_json(self) -> dict[str, Any]:
        """Everything that the report shows, for programs."""
        cells = [
            {
                "task": task,
                "length": length,
                "arm": arm,
                self.measure(task).name: self._shown(self.score(task=task, length=length, arm=arm), task),
                "failures": self.failures(task=task, length=length, arm=arm),
                "truncated": self.truncated(task=task, length=length, arm=arm),
                "agreement": self.agreement(arm, self.config.baseline_arm, task=task, length=length),
                **{name: self.figure(name, task=task, length=length, arm=arm) for name in FIGURES},
            }
            for task in self.tasks
            for length in self.lengths(task)
            for arm in self.arms
        ]
        told = {
            "run": self.run_id,
            "code": self.code,
            "counts": self.counts,
            "data": self.data,
            "baseline": self.config.baseline_arm,
        }
        return told | {"cells": cells, "config": self.config.model_dump(mode="json")}


def paired(first: Iterable[Result], second: Iterable[Result]) -> list[tuple[Result, Result]]:
    """Results of the same cases that both have a score for."""
    by_case = {result["case"]: result for result in second if "score" in result}
    return [(r, by_case[r["case"]]) for r in first if "score" in r and r["case"] in by_case]


def difference(first: Iterable[Result], second: Iterable[Result]) -> Interval | None:
    """How much better the first is, on the items that both have scores for; None if there are none."""
    gains = [a["score"] - b["score"] for a, b in paired(first, second)]
    return Interval.of(gains) if gains else None


def _above(gain: Interval, lower: bool) -> bool:
    return gain.high < 0 if lower else gain.low > 0


def _texts(result: Result) -> list[str]:
    return [turn["text"] for turn in result["turns"]]


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


_FIGURES: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "prefill_s": lambda turn: turn.get("prefill_s"),
    "prefill_tokens_per_s": lambda turn: _ratio(turn.get("prompt_tokens"), turn.get("prefill_s")),
    "first_token_s": lambda turn: turn.get("first_token_s"),
    "answer_tokens_per_s": lambda turn: _ratio(turn.get("answer_tokens", 1) - 1 or None, turn.get("answer_s")),
    "device_bytes": lambda turn: turn.get("device_bytes"),
    "past_bytes_per_token": lambda turn: _ratio(turn.get("past_bytes"), turn.get("prompt_tokens")),
    "recall": lambda turn: turn.get("recall"),
}
