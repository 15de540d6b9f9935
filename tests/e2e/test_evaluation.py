"""Evaluation of a running service: the same items, the same answers as from an engine in process."""

from __future__ import annotations

import pytest

from segcore.errors import Unavailable
from segcore.tasks.base import Room
from segcore.tasks.haystack import Haystack
from segcore.tasks.registry import make_task
from segcore.weights import load_model
from services.evaluation.arms import EngineArm
from services.served import ServedArm

pytestmark = pytest.mark.e2e


def test_a_service_answers_items_as_an_engine_in_process_does(address, config):
    model = load_model(config.model, dtype="float32", device="cpu")
    engine, served = EngineArm(model, config.segment_config(), 2**28), ServedArm(address)
    room = Room(split="eval", length=900, haystack=Haystack.named("python").part("eval"), count=len)
    try:
        for seed in range(3):
            item = make_task("needle", keys=2, turns=2).make(room, str(seed))
            ours, theirs = (arm.answers(item, 12, "none", False) for arm in (engine, served))
            assert [answer.text for answer in theirs] == [answer.text for answer in ours]
            assert [a.prompt_tokens for a in theirs] == [a.prompt_tokens for a in ours]
            assert [a.answer_tokens for a in theirs] == [a.answer_tokens for a in ours]
            assert all(a.first_token_s > 0 and a.device_bytes > 0 for a in theirs)
    finally:
        engine.close()
        served.close()


def test_a_service_that_is_gone_is_told(address):
    gone = ServedArm("127.0.0.1:9")
    item = make_task("needle").make(Room(split="eval", length=300, haystack=Haystack.named("python").part("eval")), "0")
    try:
        with pytest.raises(Unavailable):
            gone.answers(item, 2, "none", False)
    finally:
        gone.close()
