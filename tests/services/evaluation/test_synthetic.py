"""Our own tasks as cases of an evaluation: which item each one is."""

from __future__ import annotations

import json

import pytest

from segcore.errors import ConfigError
from segcore.tasks.forms import FORMS
from segcore.text import TextTokenizer
from services.evaluation.config import EvalConfig
from services.evaluation.run import Plan, check_settings
from services.evaluation.tasks.base import Frame
from services.evaluation.tasks.registry import open_suites
from tests.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def items(values):
    """The items of a task at 1,400 tokens, and how tokens are counted."""
    frame = Frame.of(TextTokenizer(byte_tokenizer()))

    def make(**changes):
        task = {"task": "needle", "lengths": [1400], "items": 6, "max_tokens": 400}
        suite = open_suites(EvalConfig.model_validate(values("x", tasks=[task | changes.pop("task", {})], **changes)))
        (only,) = suite.values()
        return [only.item(case, frame) for case in only.cases()], frame

    return make


def test_items_differ_and_follow_from_the_seed(items):
    (first, _), (again, _), (other, _) = items(), items(), items(seed=1)
    documents = {item.document for item in first}
    assert len(documents) == 6
    assert [item.document for item in again] == [item.document for item in first]
    assert not documents & {item.document for item in other}


def test_items_are_of_forms_that_training_never_sees(items):
    known = {form.name for form in FORMS["train"]}
    assert not known & {item.facts["form"] for item in items()[0]}


def test_an_answer_has_its_room(items):
    """Whatever a right one would take."""
    found, frame = items()
    for item in found:
        (turn,) = item.turns
        taken = frame.count(item.document) + frame.count(turn.question) + frame.frame_tokens
        assert 700 < taken <= 1400 - 400


def test_a_depth_is_where_the_answer_stands(items):
    found, _ = items(task={"depths": [0.0, 1.0], "items": 3})
    places = [item.turns[0].needed[0].start / len(item.document) for item in found]
    assert max(places[:3]) < 0.3 < 0.7 < min(places[3:])


SQUAD = {
    "data": [
        {
            "title": f"Article {i}",
            "paragraphs": [{"context": f"Text {i}.", "qas": [{"question": "Why?", "answers": [{"text": f"{i}"}]}]}],
        }
        for i in range(12)
    ]
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": [\n3,', r"qa\.json:2: "),
        ('{"data": [{"paragraphs": 3}]}', r"qa\.json is neither in SQuAD's format"),
        (None, r"qa\.json is neither .*No such file"),
        (json.dumps(SQUAD), r"has \d+ for eval, and not 99"),
    ],
)
def test_questions_of_a_file_are_checked_before_anything_runs(values, tmp_path, text, message):
    if text is not None:
        (tmp_path / "qa.json").write_text(text)
    task = {"task": "questions", "data": str(tmp_path / "qa.json"), "turns": 99, "lengths": [900]}
    with pytest.raises(ConfigError, match=message):
        Plan.of(EvalConfig.model_validate(values(tmp_path, tasks=[task])))


def test_questions_that_have_changed_are_refused(values, tmp_path):
    config = []
    for name, more in (("a.json", ""), ("b.json", " ")):
        (tmp_path / name).write_text(json.dumps(SQUAD) + more)
        task = {"task": "questions", "data": str(tmp_path / name), "lengths": [900]}
        config.append(EvalConfig.model_validate(values(tmp_path, tasks=[task])))
    check_settings(Plan.of(config[0]))
    (config[0].storage / config[0].run_id).rename(config[0].storage / config[1].run_id)
    with pytest.raises(ConfigError, match="data of questions have changed"):
        check_settings(Plan.of(config[1]))
