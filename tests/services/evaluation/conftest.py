"""Evaluations of a tiny random model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.evaluation.config import EvalConfig
from tests.conftest import SERVED_SEGMENT

# The full arm has 512 positions, so that it can't answer the longer ones.
NEEDLE = {
    "task": "needle",
    "lengths": [400, 700],
    "depths": [0.2, 0.8],
    "items": 1,
    "max_tokens": 4,
    "forms": ["diary"],
}
ARMS = [
    {"name": "full", "segment": {"policy": "full", "segment_tokens": 64}},
    {"name": "segmented", "segment": SERVED_SEGMENT},
]

Values = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def values(model_directory: Path) -> Values:
    """A valid configuration as a mapping, with some keys changed."""

    def make(storage: Path, /, **changes: Any) -> dict[str, Any]:
        return {
            "name": "tiny",
            "model": str(model_directory),
            "tasks": [NEEDLE],
            "arms": ARMS,
            "workers": {"threads": 1, "cpus": 0.1},
            "storage": str(storage),
        } | changes

    return make


@pytest.fixture
def config(tmp_path: Path, values: Values) -> EvalConfig:
    return EvalConfig.model_validate(values(tmp_path))
