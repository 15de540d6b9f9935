"""Workers as processes. What they run imports nothing of ours here, so that they start quickly."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import Pipe
from pathlib import Path

import pytest


def answer(peer, settings, rank):
    """A worker that dies once over the third case, as if by the kernel's hand."""
    while True:
        try:
            arm, case = peer.recv()
        except EOFError:
            return
        mark = Path(settings["storage"]) / "died"
        if case[3] == 2 and not mark.exists():
            mark.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        told = {"arm": arm, "task": case[0], "length": case[1], "depth": case[2]}
        peer.send(told | {"case": f"{case[0]}/{case[1]}@{case[2]:g}/{case[3]}", "score": 1.0})


def test_a_process_that_is_killed_is_replaced(tmp_path, values, monkeypatch):
    from services.evaluation import run
    from services.evaluation.config import EvalConfig
    from services.evaluation.summary import Summary

    monkeypatch.setattr("services.evaluation.processes.work", answer)
    monkeypatch.setattr(run, "_ray", None)
    task = {"task": "needle", "lengths": [400], "depths": [0.2], "items": 3, "forms": ["diary"]}
    config = EvalConfig.model_validate(values(tmp_path, tasks=[task], workers={"count": 2}))
    summary = Summary.read(run.evaluate(config, ray=False))
    assert (tmp_path / "died").exists()
    assert summary.counts == {"planned": 6, "scored": 6, "failed": 0, "left": 0}


def test_a_process_does_what_a_worker_does_and_tells_what_it_raises(config):
    from segcore.errors import ConfigError
    from services.evaluation.processes import work
    from services.evaluation.run import Plan
    from services.evaluation.worker import Worker

    ours, theirs = Pipe()
    settings = config.model_dump(mode="json")
    threading.Thread(target=work, args=(theirs, settings, 0), daemon=True).start()
    case = next(iter(Plan.of(config).cases.values()))
    ours.send(("segmented", tuple(case)))
    result, expected = ours.recv(), Worker(settings).run("segmented", case)
    assert result["score"] == expected["score"]
    assert result["turns"][0]["text"] == expected["turns"][0]["text"]
    ours.send(("segmented", tuple(case._replace(length=20))))  # too short to be made
    assert isinstance(ours.recv(), ConfigError)
    ours.close()


def test_a_pipe_that_breaks_is_a_worker_that_died(config, monkeypatch):
    from services.evaluation.processes import Processes

    pool, (ours, theirs) = Processes(config), Pipe()
    monkeypatch.setattr(pool, "_new", lambda: ours)
    case = ("needle", 400, None, 0)
    pool.start(None, ("full", "x"), case)
    assert pool.busy
    theirs.close()
    assert pool.wait() == (None, ("full", "x"), None)
    assert not pool.busy


@pytest.mark.parametrize(("visible", "seen"), [(None, ["0", "1", "0"]), ("4,7", ["4", "7", "4"])])
def test_workers_share_out_the_gpus(monkeypatch, visible, seen):
    from services.evaluation.processes import see_one_gpu

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    found = []
    for rank in range(3):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        see_one_gpu(rank)
        found.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert found == seen
