"""Tasks by name."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from segcore.errors import ConfigError
from segcore.tasks.base import Task
from segcore.tasks.counting import CommonWords, FrequentWords
from segcore.tasks.lookup import Lookup
from segcore.tasks.needle import Needle
from segcore.tasks.questions import Questions
from segcore.tasks.tracking import Tracking

TASKS: dict[str, type[Any]] = {
    task.name: task for task in (Needle, Tracking, Lookup, CommonWords, FrequentWords, Questions)
}


def make_task(name: str, **options: Any) -> Task:
    """A task by name. Raises ConfigError for an unknown task or option, and for values that can't be."""
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}; known: {', '.join(sorted(TASKS))}")
    known = {field.name: field for field in fields(TASKS[name])}
    if unknown := set(options) - set(known):
        raise ConfigError(
            f"task {name!r} has no option {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}"
        )
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        made: Task = TASKS[name](**given)
    except TypeError as error:
        raise ConfigError(f"task {name!r}: {error}") from error
    return made


def draw_task(name: str, options: Mapping[str, Any], rng: random.Random) -> Task:
    """As `make_task`, but of an option that lists several values one is drawn; forms are a list anyway."""
    drawn = {
        key: rng.choice(value) if isinstance(value, list | tuple) and key != "forms" else value
        for key, value in options.items()
    }
    return make_task(name, **drawn)
