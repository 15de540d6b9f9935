"""Workers with a GPU each, which meet by NCCL, learn what one worker learns."""

from __future__ import annotations

import pytest
import torch

from services.training.alone import fit_alone
from services.training.config import TrainConfig
from services.training.metrics import LINES, read_lines
from tests.services.training.conftest import text_file, values, written  # noqa: F401


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_workers_with_a_gpu_each_have_the_curve_of_one(written, parallel):  # noqa: F811
    def curve(count: int) -> list[float]:
        workers = {"count": count, "gpus": 1, "threads": 1, "parallel": parallel}
        config = TrainConfig.read(written(name=f"of-{count}", dtype="float32", workers=workers))
        assert fit_alone(config)["step"] == 6
        return [line["loss"] for line in read_lines(config.folder / LINES) if "loss" in line]

    assert curve(2) == pytest.approx(curve(1), rel=1e-4)
