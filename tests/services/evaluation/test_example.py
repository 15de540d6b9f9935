"""What is shipped as an example can be run."""

from pathlib import Path

from services.evaluation.config import EvalConfig
from services.evaluation.run import Plan

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
