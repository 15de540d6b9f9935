"""DuoAttention's gates: what is mixed is what the engine runs, and the cells that matter keep their gates."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import Tensor

from segcore.config import Cell, DuoConfig, StreamingConfig
from segcore.engine.runner import Runner
from segcore.errors import ConfigError, InvalidInput
from segcore.heads.gates import GatesReport, read_report
from segcore.model import CausalLM
from segcore.training.gates import GateTrainer
from segcore.training.stream import IGNORED, TrainingStream
from services.serving.config import ServeConfig
from tests.conftest import tiny_model
from tests.segcore.test_invariants import STREAM
from tests.segcore.unrolled import Serving, trained_model

CELLS = [Cell(layer, head) for layer in range(2) for head in range(2)]
CONFIG = DuoConfig(segment_tokens=16, sink_tokens=2, window_tokens=5)


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    return CausalLM(tiny_model())


def served(lm: CausalLM, retrieval: tuple[Cell, ...], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Hidden states by the engine's policy, [T, C]."""
    kept, hidden = [], Runner.hidden
    monkeypatch.setattr(Runner, "hidden", lambda *a, **o: kept.append(hidden(*a, **o)) or kept[-1])
    config = DuoConfig(segment_tokens=16, sink_tokens=2, window_tokens=5, retrieval=retrieval)
    with torch.inference_mode():
        serving = Serving(lm, config, TrainingStream("s", STREAM[:60]), 1024)
        while serving.state.length < 60:
            serving.step()
    return torch.cat([hidden_BTC[0] for hidden_BTC in kept])


@pytest.mark.parametrize("chosen", [CELLS, CELLS[:1], CELLS[1:3]])
def test_gates_of_one_and_nought_are_the_policy(lm, chosen, monkeypatch):
    gates = torch.tensor([[float(Cell(layer, head) in chosen) for head in range(2)] for layer in range(2)])
    with torch.no_grad():
        mixed_TC = GateTrainer(lm, CONFIG).hidden(STREAM[:60], gates.double())
    torch.testing.assert_close(mixed_TC, served(lm, tuple(chosen), monkeypatch), rtol=0, atol=1e-10)


@pytest.mark.parametrize("checkpoint_layers", [False, True])
def test_gradients_are_those_of_finite_differences(checkpoint_layers):
    lm = trained_model()
    lm.model.requires_grad_(False)
    labels = torch.where(torch.arange(50) >= 40, STREAM[:50], IGNORED)
    stream = TrainingStream("s", STREAM[:50], labels)
    trainer = GateTrainer(lm, CONFIG, sparsity=0.3, checkpoint_layers=checkpoint_layers)
    start = torch.tensor([[0.9, 0.2], [0.4, 0.7]], dtype=torch.float64)
    trainer.gates_LH.data.copy_(start)
    trainer.loss_and_grad(stream, 4 * stream.valid_tokens)
    ours = trainer.gates_LH.grad.clone()

    def loss(gates_LH: Tensor) -> float:
        trainer.gates_LH.data.copy_(gates_LH)
        return trainer.loss_and_grad(stream, stream.valid_tokens).distance + 0.3 * float(gates_LH.sum())

    for layer, head in itertools.product(range(2), range(2)):
        step = torch.zeros_like(start)
        step[layer, head] = 1e-4
        slope = (loss(start + step) - loss(start - step)) / 2e-4
        assert ours[layer, head] == pytest.approx(slope / 4, rel=1e-5)


def test_the_cells_that_matter_keep_their_gates(lm):
    streams = [TrainingStream(f"s{i}", STREAM[30 * i : 30 * i + 60]) for i in range(2)]
    trainer = GateTrainer(lm, CONFIG, sparsity=4.0)
    assert trainer.loss_and_grad(streams[0], 59).distance == 0
    trainer.gates_LH.grad = None
    optimizer = torch.optim.Adam([trainer.gates_LH], lr=0.05)
    for _ in range(30):
        for stream in streams:
            trainer.loss_and_grad(stream, sum(s.valid_tokens for s in streams))
        optimizer.step()
        optimizer.zero_grad()
        trainer.clamp()
    report = trainer.report("tiny", 0.5, 30)
    assert 0 <= min(map(min, report.gates)) < 0.5 < max(map(max, report.gates)) <= 1

    def distance(chosen: tuple[Cell, ...]) -> float:
        gates = torch.tensor([[float(Cell(layer, head) in chosen) for head in range(2)] for layer in range(2)])
        trainer.gates_LH.data.copy_(gates)
        return sum(trainer.loss_and_grad(stream, stream.valid_tokens).distance for stream in streams)

    by_distance = sorted(itertools.combinations(CELLS, 2), key=distance)
    assert report.retrieval in by_distance[:2]


def test_gates_stay_between_nought_and_one(lm):
    trainer = GateTrainer(lm, CONFIG)
    trainer.gates_LH.data.copy_(torch.tensor([[-0.2, 1.3], [0.0, 0.4]], dtype=torch.float64))
    trainer.clamp()
    assert trainer.gates_LH.tolist() == [[0.0, 1.0], [0.0, 0.4]]


@pytest.mark.parametrize("stream", [TrainingStream("s", STREAM.repeat(5)), TrainingStream("s", STREAM[:1])])
def test_streams_that_teach_nothing_are_refused(lm, stream):
    with pytest.raises(InvalidInput, match="within 512 positions"):
        GateTrainer(lm, CONFIG).loss_and_grad(stream, 1)


def test_the_report_is_what_the_service_takes(lm, tmp_path):
    path = tmp_path / "gates.json"
    trainer = GateTrainer(lm, CONFIG)
    trainer.gates_LH.data.copy_(torch.tensor([[0.1, 0.6], [0.6, 0.3]]))
    report = trainer.report("tiny", 0.25, 7)
    assert report.retrieval == (Cell(0, 1),)
    report.write(path)
    assert read_report(path) == report
    served = ServeConfig(heads=path, segment={"policy": "duo", "window_tokens": 5}).segment_config()
    assert served == DuoConfig(window_tokens=5, retrieval=(Cell(0, 1),))
    with pytest.raises(ConfigError, match="policy 'duo' alone"):
        report.apply(StreamingConfig())
    for share in (0.0, 1.2):
        with pytest.raises(ConfigError, match="share="):
            trainer.report("tiny", share, 7)
    path.write_text(json.dumps({"gates": 1}))
    with pytest.raises(ConfigError, match=r"gates.json isn't"):
        GatesReport.read(path)
