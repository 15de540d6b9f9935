"""Studies: arms of one file are trained, judged and told; what is done isn't done again."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from benchmarks import quality
from segcore.adapter import PEFT_FILES, SELECTORS_FILE
from segcore.config import FullConfig, SegmentedConfig
from segcore.errors import ConfigError
from segcore.weights import load_model
from services import study as studies
from services.cli import main
from services.processes import end
from services.study import Study, Work, figures, merged, scaled
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
    read = told["full"]["cells"][1]
    assert read["nats"] == {"0": pytest.approx(read["score"]["mean"])}  # 200 tokens are one bucket
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


def test_what_is_stopped_leaves_nobody_behind():
    # A process, and a worker of its own that wouldn't notice its end.
    worker = "import time; print('up', flush=True); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    end(process)
    process.stdout.close()
    assert process.returncode is not None
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in family)


def test_selectors_learn_beside_an_adapter_that_stays(file, runs):
    values = yaml.safe_load(file.read_text())
    learning = {"segment": SEGMENT, "selectors": {"weight": 1.0}, "lora": None, "freeze": True, "k": 0}
    source = {"tasks": [{"task": "needle", "forms": ["diary"]}], "lengths": [400], "loss": "answers"}
    learning["data"] = {"sources": [source]}
    learning["optimizer"] = {"learning_rate": 0.1}
    values["arms"] = {
        "full": values["arms"]["full"],
        "maps": {"of": "full", "train": learning, "tasks": ["one"]},
    }
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    assert main(["study", str(file), "--no-ray"]) == 0
    study = Study.read(file)
    full, maps = (study.folder / name / "export" for name in ("full", "maps"))
    ours, theirs = (load_file(folder / PEFT_FILES[1]) for folder in (maps, full))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert load_file(maps / SELECTORS_FILE)["change_CGDD"].any()
    (judged,) = study.evaluation("maps").arms
    assert judged.adapter == maps
    assert list(json.loads((study.folder / "study.json").read_text())) == ["full", "maps"]


def test_the_run_that_was_worked_on_last_is_told(file, runs):
    main(["study", str(file), "--no-ray", "--arms", "full"])
    study = Study.read(file)
    (folder,) = (study.folder / "evaluations").iterdir()
    # One of other settings, and without a result: under a name that sorts behind, and older.
    stale = folder.with_name("full-zzz")
    stale.mkdir()
    (stale / "settings.json").write_text((folder / "settings.json").read_text())
    os.utime(stale / "settings.json", (1, 1))
    assert len(figures(study, "full")["cells"]) == 2
    os.utime(folder / "settings.json", (0, 0))
    assert not figures(study, "full")["cells"]


def test_an_arm_is_evaluated_in_its_own_way(file):
    values = yaml.safe_load(file.read_text())
    values["arms"] = {"plain": {"evaluate": {"haystack_part": "all", "workers": {"count": 2}}}}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    config = Study.read(file, file.parent / "elsewhere").evaluation("plain")
    assert (config.haystack_part, config.workers.count, config.workers.threads) == ("all", 2, 1)
    assert config.storage == file.parent / "elsewhere" / "tiny" / "evaluations"


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


def test_figures_are_told_of_an_arm_and_of_those_that_go_on_with_it():
    def cell(task, length, score, **more):
        return {"task": task, "length": length, "score": {"mean": score, "items": 10}} | more

    near, far = cell("unseen", 3500, 0.5), cell("unseen", 7900, 0.7)
    ours = [near, far, cell("ppl", 8000, 2.0, nats={"0": 3.0, "4096": 2.0})]
    full = [near, cell("unseen", 7900, 1.0), cell("ppl", 8000, 1.8, nats={"0": 2.9, "4096": 1.9})]
    million = [cell("single-1m", 1000000, 1.0)]
    told = {"ours": {"cells": ours}, "full": {"cells": full}, "ours-million": {"cells": million}}
    made = {name: (value, unit, peer) for name, value, unit, _, peer in quality.figures(told, "ours", "full")}
    assert made == {
        "single_1m": (100.0, "% of 10 items", None),
        "unseen_8k": (pytest.approx(60.0), "% of 20 items", "full: 75.0"),
        "ppl_ratio": (pytest.approx(math.exp(0.1)), "of full's", "full: 6.69"),
    }
    tasks = yaml.safe_load(SHIPPED.read_text())["evaluate"]["tasks"]
    known = {(task["label"], length) for task in tasks for length in task["lengths"]}
    assert {(task, length) for _, task, lengths, _ in quality.SCORES for length in lengths} <= known


def test_the_shipped_study_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "scaled", lambda model, rope, folder: tmp_path)
    study = Study.read(SHIPPED)
    trained = [name for name, arm in study.arms.items() if arm.train is not None]
    configs = {name: study.training(name) for name in trained}
    assert {config.data for name, config in configs.items() if name != "distilled"} == {configs["ours"].data}
    # But for the one that goes on where another has come to.
    assert {config.steps for name, config in configs.items() if name != "after-full"} == {configs["ours"].steps}
    assert isinstance(configs["full"].segment_config(), FullConfig)
