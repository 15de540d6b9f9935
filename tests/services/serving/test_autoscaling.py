"""Replicas by load: the policy inside of Serve's own delays and bounds, on simulated hours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingContext

from services.serving.app import build
from services.serving.autoscaling import FIGURES, LoadPolicy
from services.serving.config import AutoscalingSettings, ServeConfig

Load = dict[str, float]

SLOTS, WAITING, SESSIONS = 8, 10_000, 64
DEPLOYMENT = DeploymentID("engine", "segcore")


def load_of(sessions: float, working: float, waiting_tokens: float) -> Load:
    """What replicas report."""
    return dict(zip(FIGURES, (working, waiting_tokens, sessions), strict=True))


IDLE = load_of(0, 0, 0)


def config(**scaling: float) -> ServeConfig:
    settings = AutoscalingSettings(**({"max_replicas": 6, "waiting_tokens": WAITING} | scaling))  # type: ignore[arg-type]
    return ServeConfig(replicas=1, slots=SLOTS, max_sessions=SESSIONS, autoscaling=settings)


def autoscaling(service: ServeConfig):
    """The configuration of the engines' autoscaling, as Serve gets it."""
    return build(service)._bound_deployment.init_args[0]._bound_deployment._deployment_config.autoscaling_config


def context(reports: list[Load], *, running: int, target: int, **rest: object) -> AutoscalingContext:
    replicas = [ReplicaID(f"r{i}", DEPLOYMENT) for i in range(running)]
    figures: dict[str, dict[ReplicaID, float]] = {}
    for replica, report in zip(replicas, reports, strict=False):
        for name, value in report.items():
            figures.setdefault(name, {})[replica] = value
    fields = dict.fromkeys(
        ("app_name", "raw_metrics", "last_scale_up_time", "last_scale_down_time", "current_time", "config")
    )
    return AutoscalingContext(
        **fields
        | {
            "deployment_id": DEPLOYMENT,
            "deployment_name": "engine",
            "current_num_replicas": running,
            "target_num_replicas": target,
            "running_replicas": replicas,
            "total_num_requests": 0.0,
            "total_queued_requests": 0.0,
            "aggregated_metrics": figures,
            "capacity_adjusted_min_replicas": 1,
            "capacity_adjusted_max_replicas": 6,
            "policy_state": {},
        }
        | rest
    )


def wanted(*reports: Load, running: int | None = None, target: int = 3) -> float:
    running = len(reports) if running is None else running
    policy = LoadPolicy(slots=SLOTS, waiting_tokens=WAITING, max_sessions=SESSIONS)
    return policy(context(list(reports), running=running, target=target))[0]


@pytest.mark.parametrize(
    ("load", "replicas"),
    [
        (load_of(24, 24, 100), 3),
        (load_of(3, 1, 45_000), 4.5),  # one long restored session
        (load_of(128, 0, 0), 2.5),  # all at rest, but they need room
        (IDLE, 0),
    ],
    ids=["sessions at work", "backlog", "room", "nothing"],
)
def test_each_figure_asks_for_replicas(load, replicas):
    assert wanted(load) == pytest.approx(replicas)


def test_replicas_loads_add_up_and_who_has_yet_to_report_is_idle():
    load = load_of(8, 8, 0)
    assert wanted(load, load, running=3) == pytest.approx(2)


def test_nothing_changes_before_anyone_has_reported():
    assert wanted(running=2, target=3) == 3


def hours(load: Callable[[float], Load], service: ServeConfig, *, start_s: float, end_s: float) -> Iterator[int]:
    """Replicas by the second, by Serve's delays and bounds around the policy. A new replica takes `start_s` to run.

    load: of the whole service at a time in seconds; replicas share it.
    """
    settings = autoscaling(service)
    policy = _apply_autoscaling_config(settings.policy.get_policy()(**settings.policy.policy_kwargs).__call__)
    target, running, state, due = settings.min_replicas, settings.min_replicas, {}, 0.0
    for second in range(int(end_s)):
        if second >= due:
            running = target
        whole = load(second)
        share = [{name: value / running for name, value in whole.items()}] * running
        now = context(share, running=running, target=target, policy_state=state, config=settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ray.serve.autoscaling_policy.time", SimpleNamespace(time=lambda at=second: float(at)))
            decided, state = policy(now)
        decided = min(max(decided, settings.min_replicas), settings.max_replicas)
        if decided != target:
            due = second + (start_s if decided > target else 0)
            target = decided
        yield running


def test_replicas_follow_a_day_of_load():
    """A rush of uploads, a long tail of idle sessions, and night."""

    def load(second: float) -> Load:
        if second < 600:
            return load_of(8, 4, 4000)
        if second < 2400:
            return load_of(40, 36, 36_000)
        return load_of(40, 2, 2000)

    replicas = list(hours(load, config(upscale_delay_s=30, downscale_delay_s=600), start_s=60, end_s=4000))
    assert set(replicas[:600]) == {1}
    assert replicas[600 + 29 + 60] == 1
    assert replicas[600 + 31 + 60] == 5  # after the delay and the start, once and for all
    assert set(replicas[700:3000]) == {5}  # it outlasts the rush by its delay
    assert replicas[-1] == 1
    assert min(replicas) == 1


def test_a_load_that_comes_and_goes_moves_nobody():
    def load(second: float) -> Load:
        return load_of(40, 40 if second % 60 < 20 else 0, 0)

    assert set(hours(load, config(upscale_delay_s=30), start_s=0, end_s=1200)) == {1}


def test_never_more_than_allowed():
    def load(second: float) -> Load:
        return load_of(1000, 1000, 10**8)

    assert max(hours(load, config(upscale_delay_s=0), start_s=0, end_s=60)) == 6


def test_serve_is_told_what_the_settings_say():
    settings = autoscaling(config(look_back_s=6, downscale_delay_s=120))
    assert (settings.min_replicas, settings.max_replicas) == (1, 6)
    assert settings.look_back_period_s == 6
    assert settings.metrics_interval_s == 2
    assert settings.downscale_delay_s == 120
    assert autoscaling(ServeConfig(replicas=3)) is None
