"""What is shipped as an example can be run."""

import re
from pathlib import Path

import yaml

from services.evaluation.config import EvalConfig
from services.evaluation.report import html
from services.evaluation.run import Plan, evaluate
from services.evaluation.summary import Summary
from tests.conftest import SERVED_SEGMENT
from tests.services.evaluation.test_run import in_process

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_the_example_is_a_plan():
    plan = Plan.of(EvalConfig.read(EXAMPLES / "eval-smoke.yaml"))
    assert len(plan.keys) == len(plan.cases) * 3 == 21
    assert plan.config.storage == EXAMPLES / "../evaluations"


def test_the_papers_lengths_are_a_plan():
    config = EvalConfig.read(EXAMPLES / "eval-prefill.yaml")
    plan = Plan.of(config)
    assert {case.length for case in plan.cases.values()} == {65_536, 131_072}
    assert [arm.segment_config(config.model).policy for arm in config.arms] == ["full", "streaming", "segmented"]


def test_the_papers_tables_come_out_at_lengths_that_are_quick(tmp_path, model_directory, monkeypatch):
    """Of a tiny model, whose full attention has 512 positions and refuses that."""
    made = yaml.safe_load((EXAMPLES / "eval-prefill.yaml").read_text())
    made |= {"model": str(model_directory), "storage": str(tmp_path), "workers": {"threads": 1}}
    made["tasks"][0] |= {"lengths": [1300], "items": 1, "max_tokens": 4}
    made["arms"][1]["segment"] |= {"segment_tokens": 64, "window_tokens": 60}
    made["arms"][2]["segment"] = SERVED_SEGMENT
    workers = in_process(monkeypatch)
    page = html(Summary.read(evaluate(EvalConfig.model_validate(made))))
    workers[0].close()
    row = r'<tr><td>[\d,]+</td><td class="text">(\w+)</td>(?:<td>[\d.,]+</td>){5}'
    assert re.findall(row, page) == ["streaming", "segmented"]
    assert page.count("1 × LimitExceeded") == 1
