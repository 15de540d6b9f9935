"""A cluster that takes jobs is found, also while its head is busy; what is said of one that doesn't."""

from __future__ import annotations

import pytest
import ray.job_submission

from segcore.errors import Unavailable
from services import jobs

BUSY = "Initialization failure from server:\nTraceback (most recent call last):\n  File x\nRuntimeError: too slow\n"


class SomeJobs(jobs.Jobs):
    """Jobs that nobody follows."""

    def follow(self, job, console):
        raise NotImplementedError


@pytest.fixture
def answers(monkeypatch):
    """What Ray's client meets, in order; then a cluster."""
    errors: list[Exception] = []

    def client(address):
        if errors:
            raise errors.pop(0)
        return address

    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", client)
    monkeypatch.setattr(jobs, "RETRY_S", 0.0)
    return errors


def test_a_head_whose_server_came_too_late_is_asked_again(answers):
    answers += [ConnectionAbortedError(BUSY), RuntimeError(BUSY)]
    assert SomeJobs("train", "ray://here:1", otherwise="")._client == "ray://here:1"


def test_patience_ends_with_the_reason_in_a_line(answers, monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE_S", -1.0)
    answers += [ConnectionAbortedError(BUSY)]
    with pytest.raises(
        Unavailable, match="at ray://here:1: Initialization failure from server: RuntimeError: too slow or"
    ):
        SomeJobs("train", "ray://here:1", otherwise="or run it here")


@pytest.mark.parametrize(
    "error", [ConnectionError("nobody answers\nmore"), RuntimeError("nobody answers"), ValueError()]
)
def test_others_are_told_at_once(answers, error):
    answers += [error]
    with pytest.raises(Unavailable, match=r"this machine: (nobody answers|ValueError) or"):
        SomeJobs("train", None, otherwise="or run it here")
