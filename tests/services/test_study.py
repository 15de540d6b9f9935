"""Studies: arms of one file are trained, judged and told; what is done isn't done again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from segcore.config import FullConfig, SegmentedConfig
from segcore.errors import ConfigError
from segcore.weights import load_model
from services import study as studies
from services.cli import main
from services.study import Study, Work, merged, scaled
from services.training import train
from tests.services.training.conftest import SEGMENT

SHIPPED = Path(__file__).parents[2] / "examples" / "study" / "quality.yaml"


@pytest.fixture
def file(tmp_path, model_directory):
    """A full-attention arm, one in segments, and the first run as the second."""
    source = {"tasks": [{"task": "needle", "forms": ["diary"]}], "lengths": [300]}
    values = {
        "name": "tiny",
        "train": {
            "model": str(model_directory),
            "dtype": "float64",
            "steps": 2,
            "lora": {"rank": 2},
            "data": {"sources": [source], "streams_per_step": 1},
            "workers": {"threads": 1},
        },
        "evaluate": {
            "tasks": [
                {"task": "needle", "label": "one", "lengths": [500], "items": 2, "max_tokens": 2, "forms": ["diary"]},
                {"task": "perplexity", "lengths": [200], "items": 1},
            ],
            "workers": {"threads": 1},
        },
        "arms": {
            "full": {"train": {"segment": {"policy": "full", "segment_tokens": 64}}},
            "segments": {"train": {"segment": SEGMENT, "selectors": {"weight": 0.1}}, "tasks": ["one"]},
            "mismatch": {"of": "full", "segment": SEGMENT, "tasks": ["one"]},
        },
        "storage": "studies",
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def runs(monkeypatch):
    """Runs are taken by this process, one after the other; which they were."""
    taken = []

    def run(self, name, module, *words):
        taken.append((name, module))
        if module == "services.cli":
            return main([*words]) == 0
        monkeypatch.setattr("sys.argv", [module, *words])
        return train.main() == 0

    monkeypatch.setattr(Work, "_run", run)
    monkeypatch.setattr("services.evaluation.run.Processes", Inline)
    monkeypatch.setattr("services.evaluation.command.write_report", lambda folder: folder)  # pictures take long
    return taken


class Inline:
    """A worker of this process."""

    def __init__(self, config):
        from services.evaluation.worker import Worker

        self._worker, self._asked = Worker(config.model_dump(mode="json")), []

    def start(self, worker, key, case):
        self._asked.append((key, case))

    def wait(self):
        key, case = self._asked.pop()
        return self, key, self._worker.run(key[0], case)

    @property
    def busy(self):
        return bool(self._asked)


def test_arms_are_trained_judged_and_told_once(file, runs, capsys):
    assert main(["study", str(file), "--no-ray"]) == 0
    folder = Study.read(file).folder
    told = json.loads((folder / "study.json").read_text())
    assert list(told) == ["full", "segments", "mismatch"]
    assert [cell["score"]["items"] for cell in told["full"]["cells"]] == [2, 1]
    assert [cell["task"] for cell in told["mismatch"]["cells"]] == ["one"]
    assert "training" not in told["mismatch"]
    assert 0 <= told["segments"]["cells"][0]["recall"] <= 1
    assert "recall" not in told["full"]["cells"][0]
    assert "| one | 500 |" in capsys.readouterr().out
    assert [module for _, module in runs].count("services.training.train") == 2
    before = len(runs)
    assert main(["study", str(file), "--no-ray"]) == 0
    assert [module for _, module in runs[before:]] == ["services.cli"] * 3


def test_what_is_judged_is_what_the_arm_says(file, runs):
    main(["study", str(file), "--no-ray", "--arms", "full"])
    study = Study.read(file)
    (judged,) = study.evaluation("full").arms
    assert isinstance(judged.segment_config(str(study.train["model"])), FullConfig)
    (judged,) = study.evaluation("mismatch").arms
    assert isinstance(judged.segment_config(str(study.train["model"])), SegmentedConfig)
    assert judged.adapter == study.folder / "full" / "export"


def test_an_arm_that_fails_leaves_the_others_theirs(file, monkeypatch):
    def run(self, name, module, *words):
        return False

    monkeypatch.setattr(Work, "_run", run)
    study = Study.read(file)
    until = time.monotonic() + 0.1
    assert not Work(study, ray=False, until=until).all(list(study.arms), jobs=1)
    assert json.loads((study.folder / "study.json").read_text()) == {}


def test_time_that_is_up_stops_what_runs(file, tmp_path):
    study = Study.read(file)
    work = Work(study, ray=False, until=time.monotonic() + 1)
    assert not work._run("full", "http.server", "--bind", "127.0.0.1", "0")
    assert not work._run("full", "this")  # nothing begins any more


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"late": {"of": "full"}, "full": {"train": {}}}, "must be an earlier arm"),
        ({"full": {"train": {}, "tasks": ["two"]}}, "there is no two"),
        ({"full": {"train": {"k": -1}}}, "arm 'full': k"),
        ({"full": {"trains": {}}}, "there is no such key"),
    ],
)
def test_what_cannot_be_is_told(file, arms, message):
    values = yaml.safe_load(file.read_text()) | {"arms": arms}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(ConfigError, match=message):
        Study.read(file)


def test_changes_are_merged_key_by_key():
    base = {"a": {"b": 1, "c": 2}, "d": [1]}
    assert merged(base, {"a": {"b": 3}, "d": [2]}) == {"a": {"b": 3, "c": 2}, "d": [2]}
    assert merged(base, {"a": None}) == {"d": [1]}


def test_a_model_has_other_positions_and_the_same_weights(model_directory, tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "positions": 2048}
    paths = scaled(str(model_directory), rope, tmp_path), model_directory
    made, own = (load_model(str(path), dtype="float64").lm for path in paths)
    assert made.spec.max_positions == 2048
    assert not made.rope.table[0].equal(own.rope.table[0])
    same = zip(made.model.parameters(), own.model.parameters(), strict=True)
    assert all(a.equal(b) for a, b in same)


def test_the_shipped_study_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "scaled", lambda model, rope, folder: tmp_path)
    study = Study.read(SHIPPED)
    trained = [name for name, arm in study.arms.items() if arm.train is not None]
    configs = {name: study.training(name) for name in trained}
    assert {config.data for config in configs.values()} == {configs["ours"].data}
    assert {config.steps for config in configs.values()} == {configs["ours"].steps}
    assert isinstance(configs["full"].segment_config(), FullConfig)
