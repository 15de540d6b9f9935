"""Rates that fade and are forgotten, and a pace that is kept."""

from __future__ import annotations

import pytest

from segcore import rate
from segcore.rate import FORGOTTEN_S, Pace, Rate


class Clock:
    """Time that passes when it is told to, or slept."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(rate, "time", made)
    return made


def test_later_measurements_count_more(clock):
    speed = Rate()
    assert speed.seconds(10) is None
    speed.add(100, 1)
    assert speed.seconds(10) == pytest.approx(0.1)
    for _ in range(20):
        speed.add(100, 10)
    assert speed.seconds(10) == pytest.approx(1, rel=0.02)


def test_what_is_done_at_once_counts_together(clock):
    speed = Rate()
    for _ in range(4):
        speed.begin()
    for _ in range(4):
        clock.now += 1
        speed.end(100)
    assert speed.seconds(100) == pytest.approx(1)
    clock.now += 50  # nothing is under way
    speed.begin()
    clock.now += 1
    speed.end(100)
    assert speed.seconds(100) == pytest.approx(1)


def test_failures_make_slower_and_old_rates_are_forgotten(clock):
    speed = Rate()
    speed.add(100, 1)
    speed.begin()
    clock.now += 1
    speed.end(0)
    assert speed.seconds(100) > 1.5
    clock.now += FORGOTTEN_S
    assert speed.seconds(100) is None


def test_a_pace_is_kept(clock):
    pace = Pace(100)
    for _ in range(5):
        pace.wait(200)
    assert clock.now == 108  # the first goes at once, each other when the one before is paid for
    clock.now += 60
    pace.wait(10)
    assert clock.now == 168
    Pace(None).wait(1e9)
    assert clock.now == 168
