"""What is served by default answers from what it can no longer see: facts in prose, of forms that nothing trains."""

from __future__ import annotations

import dataclasses

import pytest

import segcore
from benchmarks.facts import FACTS, essays, replies
from segcore.presets import model_segment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_what_is_served_answers_from_what_local_cells_cannot_see(monkeypatch):
    """Tails and the open segment see the last third."""
    monkeypatch.setattr("benchmarks.facts.FACTS", FACTS[:6])
    model = segcore.load_model(device="cpu", adapter="default")
    preset = model_segment(model.name, {}, adapter="default")
    with_past = list(replies(model, preset, essays(), 4_600, until=2 / 3))
    blind = dataclasses.replace(preset, retrieved_tokens=0, selectors=())
    local_only = list(replies(model, blind, essays(), 4_600, until=2 / 3))
    assert sum(reply.right for reply in local_only) <= 1
    assert sum(reply.took == 1 for reply in with_past) >= 5
    assert sum(reply.right for reply in with_past) >= 5, [reply.text for reply in with_past]
