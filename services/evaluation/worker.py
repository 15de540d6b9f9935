"""A worker: makes cases' items, has them answered by an arm, and judges the answers. Knows no Ray."""

from __future__ import annotations

import os
from typing import Any

import torch

from segcore.errors import SegcoreError, Unavailable
from segcore.tasks.base import Item
from segcore.weights import LoadedModel, load_model
from services.evaluation.arms import Answer, Arm, EngineArm, as_record
from services.evaluation.cases import Case, Frame, open_suites
from services.evaluation.config import ArmSection, EvalConfig
from services.evaluation.endpoint import EndpointArm
from services.evaluation.results import Result
from services.evaluation.scores import METRICS
from services.served import ServedArm

# Characters of a needed passage that a result tells.
TOLD = 300


class Worker:
    """One arm at a time; a model stays for the next arm that needs the same."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._config = EvalConfig.model_validate(settings)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        workers = self._config.workers
        torch.set_num_threads(workers.threads or max(1, int(workers.cpus)))
        self._suites = open_suites(self._config)
        self._models: dict[tuple[str, str, str], LoadedModel] = {}
        self._frame: Frame | None = None
        self._arm: tuple[str, Arm] | None = None

    def run(self, arm: str, case: Case) -> Result:
        """A case's result under an arm; what can't be answered is a result too.

        Raises SegcoreError if the arm can't be had, or the item can't be made.
        """
        case = Case(*case)
        suite = self._suites[case.task]
        item = suite.item(case, self.frame)
        result: Result = {
            "arm": arm,
            "case": case.id,
            "task": case.task,
            "length": case.length,
            "depth": case.depth,
            "item": item.name,
            "facts": item.facts,
        }
        section, opened = suite.section, self._opened(arm)
        try:
            answers = opened.answers(item, section.max_tokens, section.lead, self._config.truncate)
        except Unavailable:
            raise  # another time it may do: the case stays without a result, and the run can go on later
        except SegcoreError as error:
            return result | {"error": {"kind": type(error).__name__, "message": error.message}}
        turns = [self._judged(item, i, answer) for i, answer in enumerate(answers)]
        scores = {name: sum(turn["scores"][name] for turn in turns) / len(turns) for name in METRICS}
        return result | {"score": scores[suite.metric], "scores": scores, "turns": turns}

    def close(self) -> None:
        if self._arm is not None:
            self._arm[1].close()
            self._arm = None

    @property
    def frame(self) -> Frame:
        """How tokens are counted: alike for all arms, so that all are asked the same."""
        if self._frame is None:
            name = self._config.tokenizer or self._config.model
            self._frame = Frame.of(self._model(name, "auto", None).tokenizer)
        return self._frame

    def _judged(self, item: Item, turn: int, answer: Answer) -> dict[str, Any]:
        said = item.turns[turn]
        return {
            "question": said.question,
            "expected": said.expected,
            "needed": [item.document[start:end][:TOLD] for start, end in said.needed],
            "scores": {name: metric(answer.text, said.expected, said.match) for name, metric in METRICS.items()},
            **as_record(answer),
        }

    def _opened(self, name: str) -> Arm:
        if self._arm is None or self._arm[0] != name:
            self.close()
            section = next(arm for arm in self._config.arms if arm.name == name)
            self._arm = name, self._open(section)
        return self._arm[1]

    def _open(self, section: ArmSection) -> Arm:
        if section.service is not None:
            return ServedArm(section.service)
        if section.url is not None:
            return EndpointArm(section)
        name = section.model or self._config.model
        model = self._model(name, section.dtype, None if section.adapter is None else str(section.adapter))
        return EngineArm(model, section.segment_config(name), self._config.past_bytes)

    def _model(self, name: str, dtype: str, adapter: str | None) -> LoadedModel:
        key = name, dtype, adapter or ""
        if key not in self._models:
            self._models[key] = load_model(name, dtype=dtype, adapter=adapter)
        return self._models[key]
