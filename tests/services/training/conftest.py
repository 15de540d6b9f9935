"""Runs of a tiny random model, and a configuration file to begin with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from services.training.config import TrainConfig
from services.training.parallel import Workers
from services.training.worker import Run

SEGMENT = {
    "policy": "segmented",
    "segment_tokens": 32,
    "sink_tokens": 2,
    "tail_tokens": 16,
    "reader_tail_tokens": 8,
    "retrieved_tokens": 8,
    "block_tokens": 4,
    "query_window_tokens": 8,
    "selectors": [[0, 1], [1, 0]],
}
TEXT = "the quick brown fox jumps over a lazy dog while rain in the river runs into town and out of it again"
WORDS = TEXT.split(" ")


def texts(count: int) -> list[str]:
    """Lines of 4 to 19 words, so that streams differ in their number of segments."""
    return [" ".join(WORDS[(i * j + i) % len(WORDS)] for j in range(4 + 5 * (i % 4))) for i in range(count)]


def lines(texts: list[str]) -> str:
    """Texts as JSON lines."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text(lines(texts(12)))
    return file


Values = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def values(model_directory: Path, text_file: Path) -> Values:
    """A valid configuration as a mapping, with some keys changed."""

    def make(storage: Path, /, **changes: Any) -> dict[str, Any]:
        data = {"sources": [{"files": [str(text_file)]}], "streams_per_step": 4}
        return {
            "name": "run",
            "model": str(model_directory),
            "dtype": "float64",
            "segment": SEGMENT,
            "steps": 6,
            "data": data,
            "evaluation": {"data": data, "streams": 3},
            "optimizer": {"learning_rate": 0.01},
            "checkpoints": {"every": 2},
            "workers": {"threads": 1},
            "storage": str(storage),
        } | changes

    return make


@pytest.fixture
def written(tmp_path: Path, values: Values) -> Callable[..., Path]:
    """The same as a file."""

    def write(**changes: Any) -> Path:
        file = tmp_path / "train.yaml"
        file.write_text(yaml.safe_dump(values(tmp_path / "runs", **changes), sort_keys=False))
        return file

    return write


class Alone:
    """Runs in this process, whose checkpoints appear where Ray would put them."""

    def __init__(self, config: TrainConfig) -> None:
        self.reported: list[dict[str, float]] = []
        self.run = Run(config, Workers(), torch.device("cpu"), self._report)

    def _report(self, metrics: dict[str, float], folder: Path | None, name: str) -> None:
        from services.training.folders import publish

        self.reported.append(metrics)
        if folder is not None:
            publish(folder)
