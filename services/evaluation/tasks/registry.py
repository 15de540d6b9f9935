"""Tasks by name."""

from __future__ import annotations

from segcore.errors import ConfigError
from segcore.tasks.registry import TASKS
from services.evaluation.config import EvalConfig
from services.evaluation.tasks.base import Suite
from services.evaluation.tasks.benchmarks.babilong import BabiLong
from services.evaluation.tasks.benchmarks.infinitebench import InfiniteBench
from services.evaluation.tasks.benchmarks.longbench import LongBench
from services.evaluation.tasks.benchmarks.longbench2 import LongBench2
from services.evaluation.tasks.perplexity import Perplexity
from services.evaluation.tasks.ruler.suite import MAKERS, Ruler
from services.evaluation.tasks.synthetic import Synthetic

SUITES: dict[str, type[Suite]] = {
    **dict.fromkeys(TASKS, Synthetic),
    "perplexity": Perplexity,
    **dict.fromkeys(MAKERS, Ruler),
    "longbench": LongBench,
    "longbench-v2": LongBench2,
    "infinitebench": InfiniteBench,
    "babilong": BabiLong,
}


def open_suites(config: EvalConfig) -> dict[str, Suite]:
    """The tasks of a configuration by their names. Raises ConfigError."""
    if unknown := {section.task for section in config.tasks} - set(SUITES):
        raise ConfigError(f"unknown task {sorted(unknown)[0]!r}; known: {', '.join(sorted(SUITES))}")
    return {section.name: SUITES[section.task](section, config) for section in config.tasks}
