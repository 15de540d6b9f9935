"""Workers with a GPU each, which meet by NCCL, learn what one worker learns: by themselves and as Ray's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.training.alone import fit_alone
from services.training.config import TrainConfig
from services.training.metrics import LINES, read_lines
from tests.services.training.conftest import text_file, values, written  # noqa: F401


def alone(config: Path) -> None:
    fit_alone(TrainConfig.read(config))


def by_ray(config: Path) -> None:
    pytest.importorskip("ray")
    subprocess.run([sys.executable, "-m", "services.cli", "train", str(config), "--local"], check=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("run", [alone, by_ray])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_workers_with_a_gpu_each_have_the_curve_of_one(written, parallel, run):  # noqa: F811
    def curve(count: int, run: Callable[[Path], None]) -> list[float]:
        workers = {"count": count, "gpus": 1, "threads": 1, "parallel": parallel}
        config = written(name=f"of-{count}", dtype="float32", workers=workers)
        run(config)
        losses = [line["loss"] for line in read_lines(TrainConfig.read(config).folder / LINES) if "loss" in line]
        assert len(losses) == 6
        return losses

    assert curve(2, run) == pytest.approx(curve(1, alone), rel=1e-4)
