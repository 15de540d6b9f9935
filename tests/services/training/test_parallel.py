"""Two workers without Ray: replicated or sharded, as one alone; and ended together."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from segcore.errors import NonFiniteLoss, SegcoreError
from segcore.training.stream import TrainingStream
from services.training.config import TrainConfig, WorkersSection
from services.training.folders import TENSORS, latest, publish
from services.training.metrics import LINES, read_lines
from services.training.parallel import Workers
from services.training.worker import Run
from tests.services.training.conftest import Alone

pytestmark = pytest.mark.slow


class Interrupted(Run):
    def take_step(self, batch: Sequence[TrainingStream]) -> None:
        if self.step == 4:
            raise InterruptedError
        super().take_step(batch)


def two_workers(rank: int, folder: Path, config: str) -> None:
    """What each process runs: a run; half a sharded one, its other half as another; one poisoned on the second."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{os.environ['MEET']}", rank=rank, world_size=2)
    sharded = TrainConfig.model_validate_json(config)

    def report(metrics: dict[str, float], made: Path | None, name: str) -> None:
        if made is not None:
            publish(made)
        dist.barrier()

    replicated = sharded.model_copy(update={"name": "replicated", "workers": WorkersSection(count=2)})
    Run(replicated, Workers(), torch.device("cpu"), report).train()

    first = Interrupted(sharded, Workers(), torch.device("cpu"), report)
    shards = [master.to_local().numel() for master in first.optimizer.masters]  # type: ignore[attr-defined]
    with pytest.raises(InterruptedError):
        first.train()
    second = Run(sharded, Workers(), torch.device("cpu"), report)
    assert second.step == 4
    second.train()

    poisoned = Run(sharded.model_copy(update={"name": "poisoned"}), Workers(), torch.device("cpu"), report)
    if rank == 1:
        poisoned.learner.model.lm.model.lm_head.weight.data[7] = torch.nan
    ended = ""
    try:
        poisoned.take_step(next(poisoned.data.batches(rank, 2)))
    except SegcoreError as error:
        ended = type(error).__name__
    (folder / f"{rank}.json").write_text(json.dumps({"shards": sum(shards), "ended": ended}))
    dist.destroy_process_group()


def curve_of(run: Path, key: str) -> list[float]:
    return [line[key] for line in read_lines(run / LINES) if key in line]


def test_two_workers_are_one_and_a_loss_that_is_no_number_ends_both(values, tmp_path, monkeypatch):
    changes = {"schedule": {"kind": "constant"}, "optimizer": {"learning_rate": 0.01, "weight_decay": 0.1}}
    monkeypatch.setenv("MEET", "1")
    sharded = values(tmp_path, name="sharded", workers={"count": 2, "parallel": "fsdp"}, **changes)
    mp.spawn(two_workers, (tmp_path, TrainConfig.model_validate(sharded).to_json()), nprocs=2)

    alone = TrainConfig.model_validate(values(tmp_path, name="alone", **changes))
    one = Alone(alone)
    one.run.train()
    for key in ("loss", "eval_loss"):
        curve = curve_of(tmp_path / "alone", key)
        assert len(curve) == {"loss": 6, "eval_loss": 4}[key]
        for name in ("replicated", "sharded"):
            assert curve_of(tmp_path / name, key) == pytest.approx(curve, rel=1e-9)
    for name, file in product(("replicated", "sharded"), ("model.safetensors", TENSORS)):
        ours, theirs = (load_file(latest(tmp_path / run) / file) for run in (name, "alone"))
        assert ours.keys() == theirs.keys()
        for tensor, value in ours.items():
            assert torch.allclose(value, theirs[tensor], rtol=1e-6, atol=1e-12), tensor

    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert {line["ended"] for line in told} == {NonFiniteLoss.__name__}
    parameters = sum(p.numel() for p in one.run.learner.named.values())
    assert sum(line["shards"] for line in told) == parameters
    assert all(abs(line["shards"] - parameters / 2) < 0.1 * parameters for line in told)
    assert len(list((tmp_path / "poisoned" / "nonfinite").iterdir())) == 2
