"""Starting a Ray of one's own."""

from __future__ import annotations

import pytest
import ray

from segcore.errors import Unavailable
from services.local_ray import STARTS, start_ray

LATE = "The current node timed out during startup. This could happen because"


@pytest.mark.parametrize("late", range(STARTS))
def test_a_ray_that_starts_too_slowly_is_started_again(monkeypatch, late):
    starts: list[object] = []

    def init(**options: object) -> None:
        starts.append(options["address"])
        if len(starts) <= late:
            raise Exception(LATE)  # as Ray raises it

    monkeypatch.setattr(ray, "init", init)
    start_ray(1)
    assert starts == ["local"] * (late + 1)


@pytest.mark.parametrize(("error", "raised"), [(Exception(LATE), Unavailable), (ValueError("other"), ValueError)])
def test_what_never_starts_is_an_error(monkeypatch, error, raised):
    def init(**options: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(raised):
        start_ray(1)
