"""Every policy is trained by the same command and configuration, and gates of heads are, too."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file

from segcore.config import segment_config
from segcore.heads.gates import GatesReport
from segcore.presets import model_segment, segment_preset
from segcore.weights import load_model
from services.cli import main
from services.training import commands
from services.training.config import TrainConfig
from services.training.folders import export, latest
from services.training.learners import GATES
from services.training.metrics import LINES, read_lines
from tests.services.training.conftest import SEGMENT, Alone

POLICIES = {
    "full": {},
    "streaming": {"segment_tokens": 32, "sink_tokens": 2, "window_tokens": 16},
    "longgen": {"segment_tokens": 32, "sink_tokens": 2, "window_tokens": 16, "full_layers": [1]},
    "lagkv": {"sink_tokens": 2, "lag_tokens": 32, "keep": 0.5},
    "duo": {"segment_tokens": 32, "sink_tokens": 2, "window_tokens": 16, "retrieval": [[1, 0]]},
    "segmented": {name: value for name, value in SEGMENT.items() if name != "policy"},
}


@pytest.fixture
def here(monkeypatch):
    """`segcore train --local` trains in this process: what it does on a Ray of its own is for test_jobs."""

    def run(config, console, *, resume, ray):
        alone = Alone(config)
        alone.run.train()
        export(latest(config.folder), config.folder / "export")
        return 0

    monkeypatch.setattr(commands, "run_locally", run)


def losses(config, key="loss"):
    return [line[key] for line in read_lines(config.folder / LINES) if key in line]


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_is_trained_evaluated_and_served_by_the_same_command(here, written, policy):
    segment = {"policy": policy} | POLICIES[policy]
    file = written(segment=segment, steps=3, checkpoints={})
    assert main(["train", str(file), "--local"]) == 0
    config = TrainConfig.read(file)
    assert len(losses(config)) == 3
    first, last = losses(config, "eval_loss")
    assert last < first - 0.1
    served = segment_preset(str(config.folder / "export"))
    assert served == config.segment_config() == segment_config(**segment)


def test_the_papers_mismatch_trains_full_attention_and_serves_segments(here, written):
    plain = yaml.safe_load(written().read_text())
    curves = {}
    for name, trained in (("matched", SEGMENT), ("mismatched", {"policy": "full"})):
        changes = {"name": name, "segment": trained, "steps": 3, "checkpoints": {}}
        file = written(**changes, evaluation=plain["evaluation"] | {"segment": SEGMENT})
        assert main(["train", str(file), "--local"]) == 0
        config = TrainConfig.read(file)
        curves[name] = losses(config), losses(config, "eval_loss")
        assert segment_preset(str(config.folder / "export")).policy == "segmented"
    # The same start under the same policy, reached by two trainings.
    assert curves["matched"][1][0] == curves["mismatched"][1][0]
    assert curves["matched"][0] != curves["mismatched"][0]
    assert curves["matched"][1][1] != curves["mismatched"][1][1]


GATED = {
    "segment": {"policy": "duo", "segment_tokens": 8, "sink_tokens": 2, "window_tokens": 4},
    "gates": {"share": 0.5, "sparsity": 0.5},
    "optimizer": {"learning_rate": 0.05, "max_norm": None},
    "steps": 6,
}


def test_gates_are_trained_and_become_the_cells_of_policy_duo(here, written, model_directory):
    file = written(**GATED)
    before = load_model(str(model_directory), dtype="float64", device="cpu").lm.model.state_dict()
    assert main(["train", str(file), "--local"]) == 0
    config = TrainConfig.read(file)
    heads = config.folder / "export" / GATES
    report = GatesReport.read(heads)
    assert [path.name for path in heads.parent.iterdir()] == [GATES]
    gates = torch.tensor(report.gates)
    assert gates.max() <= 1
    assert gates.min() < 0.9
    assert len(report.retrieval) == 2
    assert gates[tuple(report.retrieval[0])] >= gates.median()
    served = model_segment(str(model_directory), GATED["segment"], heads=heads)
    assert served.retrieval == report.retrieval
    retrained = written(name="with-cells", segment=GATED["segment"] | {"heads": str(heads)}, steps=1)
    assert TrainConfig.read(retrained).segment_config() == served
    assert losses(config)[0] == 0, "gates of 1 are full attention"
    assert all(torch.equal(v, before[k]) for k, v in Alone(config).run.learner.model.lm.model.state_dict().items())


def test_gates_go_on_where_they_stood(written):
    whole = TrainConfig.read(written(**GATED, name="whole"))
    Alone(whole).run.train()
    broken = TrainConfig.read(written(**GATED, name="broken"))
    run = Alone(broken).run
    batches = run.data.batches()
    for _ in range(2):
        run.take_step(next(batches))
    run._checkpoint()
    again = Alone(broken).run
    assert again.step == 2
    again.train()
    assert GatesReport.read(latest(broken.folder) / GATES) == GatesReport.read(latest(whole.folder) / GATES)
    ours, theirs = (load_file(latest(config.folder) / "training.safetensors") for config in (broken, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {}}, "trained alone"),
        ({"segment": SEGMENT}, "set segment: {policy: duo}"),
        ({"gates": {"share": 0}}, "gates.share: Input should be greater than 0"),
    ],
)
def test_gates_of_what_has_none_are_refused(written, capsys, changes, message):
    assert main(["train", str(written(**GATED | changes)), "--local"]) == 1
    assert message in capsys.readouterr().err
