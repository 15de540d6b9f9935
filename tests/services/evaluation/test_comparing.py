"""Two runs beside each other, and what a page marks."""

from __future__ import annotations

import json
import math
import re
from contextlib import closing

import pytest

from segcore.errors import InvalidRequest
from services.cli import main
from services.evaluation.config import EvalConfig
from services.evaluation.report import html
from services.evaluation.results import ResultFile
from services.evaluation.run import RESULTS, Plan, check_settings
from services.evaluation.summary import Summary
from services.evaluation.tables import compared

ARMS = ("full", "segmented")
TASKS = [{"task": "needle", "lengths": [400], "items": 8}, {"task": "perplexity", "lengths": [400], "items": 8}]


@pytest.fixture
def kept(tmp_path, values):
    """The folder of a finished run, whose scores are made by a function of task, arm and number."""

    def keep(name, score, tasks=TASKS):
        config = EvalConfig.model_validate(values(tmp_path, name=name, tasks=tasks))
        plan = Plan.of(config)
        check_settings(plan)
        with closing(ResultFile(config.folder / RESULTS)) as file:
            for arm, case_id in plan.keys:
                case = plan.cases[case_id]
                told = {"task": case.task, "length": case.length, "depth": case.depth, "facts": {}}
                file.add({"arm": arm, "case": case_id, **told, "score": score(case.task, arm, case.number)})
        return config.folder

    return keep


def test_two_runs_are_compared_by_item(kept, capsys):
    """Half of them are right in the first run, all in the second, and perplexity falls from 20 to 10."""
    before = kept("before", lambda task, arm, i: float(i % 2) if task == "needle" else math.log(20) + i / 100)
    after = kept("after", lambda task, arm, i: 1.0 if task == "needle" else math.log(10) + i / 100)
    assert main(["eval", "compare", str(before), str(after)]) == 0
    rows = " ".join(capsys.readouterr().out.split())
    for arm in ARMS:
        assert re.search(rf"needle 400 {arm} 50\.0 \(.*?, n 8\) 100\.0 \(.*?, n 8\) \+50\.0 \(\+12\.5 to \+", rows)
        assert re.search(rf"perplexity 400 {arm} 20\.\d+ \(.*?\) 10\.\d+ \(.*?\) -50\.0% \(-50\.0% to -50\.0%", rows)
    assert "different code" not in rows
    settings = json.loads((after / "settings.json").read_text())
    (after / "settings.json").write_text(json.dumps(settings | {"code": "other"}))
    assert main(["eval", "compare", str(before), str(after)]) == 0
    assert "different code" in " ".join(capsys.readouterr().out.split())


def test_runs_that_have_nothing_in_common_are_refused(kept):
    runs = [Summary.read(kept(f"{n}", lambda *_: 1.0, [{"task": "needle", "lengths": [n]}])) for n in (400, 500)]
    with pytest.raises(InvalidRequest, match="no task, length and arm in common"):
        compared(*runs)


@pytest.mark.parametrize("words", [["compare", "one"], ["report", "gone"], ["compare", "gone", "gone"], ["a", "b"]])
def test_folders_that_are_none_are_told(words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *words]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert re.search("see `segcore eval --help`|gone isn't an evaluation's folder", told)


def test_the_page_marks_no_winner_whose_lead_may_be_chance(kept):
    score = {
        "close": lambda task, arm, i: float(i == 0 and arm == "full"),
        "clear": lambda task, arm, i: float(arm == "segmented"),  # more right answers, and more perplexity
    }
    close, clear = (html(Summary.read(kept(name, made))) for name, made in score.items())
    assert 'class="best"' not in close
    assert re.findall(r'<tr><td>(\w+)</td><td>400</td><td class="(\w*)">.*?<td class="(\w*)">', clear) == [
        ("needle", "", "best"),
        ("perplexity", "best", ""),
    ]


def test_a_report_is_written_again(kept, capsys):
    folder = kept("again", lambda *_: 1.0)
    assert main(["eval", "report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    cells = json.loads((folder / "report.json").read_text())["cells"]
    assert [(c["task"], c["arm"]) for c in cells] == [(t["task"], arm) for t in TASKS for arm in ARMS]
