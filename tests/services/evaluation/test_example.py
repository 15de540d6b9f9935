"""What is shipped as an example can be run."""

from pathlib import Path

from services.evaluation.config import EvalConfig
from services.evaluation.run import Plan

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_the_example_is_a_plan():
    plan = Plan.of(EvalConfig.read(EXAMPLES / "eval-smoke.yaml"))
    assert len(plan.keys) == len(plan.cases) * 3 == 21
    assert plan.config.storage == EXAMPLES / "../evaluations"
