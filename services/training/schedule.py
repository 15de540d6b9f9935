"""Learning rates: a function of the step alone, so that a run that goes on needs to remember nothing."""

from __future__ import annotations

import math

from services.training.config import ScheduleSection


def rate(schedule: ScheduleSection, step: int, steps: int) -> float:
    """The share of the learning rate that step `step` of `steps`, counted from 0, is taken with."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    done = (step - schedule.warmup_steps) / max(1, steps - 1 - schedule.warmup_steps)
    match schedule.kind:
        case "constant":
            return 1.0
        case "linear":
            fall = done
        case "cosine":
            fall = (1 - math.cos(math.pi * min(done, 1.0))) / 2
    return 1 - (1 - schedule.final) * min(fall, 1.0)
