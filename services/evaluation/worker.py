"""A worker: makes cases' items, has them answered by an arm, and judges the answers. Knows no Ray."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import torch

from segcore.errors import ConfigError, SegcoreError, Unavailable
from segcore.memory import is_out_of_memory
from segcore.weights import LoadedModel, load_model
from services.evaluation.arms import Arm, EngineArm
from services.evaluation.config import ArmSection, EvalConfig
from services.evaluation.endpoint import EndpointArm
from services.evaluation.results import Result
from services.evaluation.tasks.base import Case, Frame, Suite
from services.evaluation.tasks.registry import open_suites


class Worker:
    """One arm at a time; a model stays for the next arm that needs the same.

    Making one raises nothing of its own, for that would look as if it had died.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        self._models: dict[tuple[str, str, str], LoadedModel] = {}
        self._frame: Frame | None = None
        self._arm: tuple[str, Arm] | None = None

    @cached_property
    def _config(self) -> EvalConfig:
        config = EvalConfig.model_validate(self._settings)
        torch.set_num_threads(config.workers.threads or max(1, int(config.workers.cpus)))
        return config

    @cached_property
    def _suites(self) -> dict[str, Suite]:
        return open_suites(self._config)

    def run(self, arm: str, case: Case) -> Result:
        """A case's result under an arm; what can't be answered is a result too.

        Raises SegcoreError if the arm can't be had, or the item can't be made.
        """
        case = Case(*case)
        told = {"arm": arm, "case": case.id, "task": case.task, "length": case.length, "depth": case.depth}
        opened = self._opened(arm)
        try:
            return told | self._suites[case.task].result(case, self.frame, opened)
        except (Unavailable, ConfigError):
            raise  # nothing of the case's own: it stays without a result, and the run can go on later
        except SegcoreError as error:
            return told | {"error": {"kind": type(error).__name__, "message": error.message}}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.close()  # the next case begins with memory that nothing holds
            return told | {"error": {"kind": "OutOfMemory", "message": str(error)}}

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

    def _opened(self, name: str) -> Arm:
        if self._arm is None or self._arm[0] != name:
            self.close()
            section = next(arm for arm in self._config.arms if arm.name == name)
            try:
                self._arm = name, self._open(section)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                model = section.model or self._config.model
                raise ConfigError(f"arm {name!r}: {model} is too large for a worker's memory: {error}") from error
        return self._arm[1]

    def _open(self, section: ArmSection) -> Arm:
        if section.service is not None:
            from services.served import ServedArm  # brings gRPC along, which an engine of its own doesn't need

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
