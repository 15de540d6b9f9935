"""Scores, statistics, and what an answer's figures are."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from segcore.errors import ConfigError, LimitExceeded
from segcore.tasks.base import Item, Span, Turn
from segcore.weights import load_model
from services.evaluation.arms import Answer, EngineArm, as_record
from services.evaluation.config import EvalConfig
from services.evaluation.report import html
from services.evaluation.scores import exact, f1, match
from services.evaluation.summary import Interval, Summary, difference
from services.evaluation.tables import scores
from services.evaluation.tasks.base import Frame
from services.evaluation.tasks.registry import open_suites


@pytest.mark.parametrize(
    ("metric", "answer", "expected", "mode", "score"),
    [
        (match, "The number is 123.", ("123",), "all", 1),
        (match, "RED and blue", ("red", "green"), "all", 0.5),
        (match, "red", ("blue", "Red"), "any", 1),
        (match, "", ("x",), "any", 0),
        (exact, "The Eiffel Tower!", ("eiffel tower",), "any", 1),
        (exact, "It is the Eiffel Tower", ("eiffel tower",), "any", 0),
        (exact, "red, and blue.", ("blue", "red"), "all", 1),
        (exact, "red, blue and green", ("blue", "red"), "all", 0),
        (exact, "red", ("blue", "red"), "all", 0),
        (f1, "Eiffel tower in Paris", ("eiffel tower", "x"), "any", 2 * 2 / 6),
        (f1, "nothing", ("eiffel tower",), "any", 0),
        (f1, "blue red", ("red", "blue"), "all", 1),
    ],
)
def test_metrics(metric, answer, expected, mode, score):
    assert metric(answer, expected, mode) == pytest.approx(score)


def test_an_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = sum(i.low <= 0.3 <= i.high for i in (Interval.of(rng.random(80) < 0.3) for _ in range(200)))
    assert 175 <= covered <= 200
    assert Interval.of([1.0]) == (1, 1, 1, 1)
    assert Interval.of([0, 1, 1]) == Interval.of([0, 1, 1])


def result(arm, number, score, length=100, **more):
    turn = {
        "text": f"{score}",
        "score": score,
        "scores": {"match": score},
        "expected": ["x"],
        "question": "?",
        "needed": [],
    }
    told = {"task": "needle", "length": length, "depth": None, "case": f"needle/{length}/{number}", "facts": {}}
    return {"arm": arm, **told, "score": score, "turns": [turn | more]}


def summary(values, results, **changes):
    config = EvalConfig.model_validate(values("x", **changes))
    return Summary(config, results, 100, "x")


def test_arms_are_compared_on_the_items_that_both_answered():
    first = [result("a", i, 1.0) for i in range(10)]
    second = [result("b", i, 0.0) for i in range(5, 15)] + [{"arm": "b", "case": "needle/100/3", "error": {}}]
    assert difference(first, second) == (1, 1, 1, 5)
    assert difference(first, []) is None


def test_a_winner_is_marked_only_where_intervals_say_so(values):
    clear = [result(arm, i, float(arm == "segmented" or i < 3)) for arm in ("full", "segmented") for i in range(20)]
    assert summary(values, clear).best(task="needle") == "segmented"
    close = [result(arm, i, float((i + (arm == "full")) % 2)) for arm in ("full", "segmented") for i in range(20)]
    assert summary(values, close).best(task="needle") is None
    few = [result(arm, i, float(arm == "segmented")) for arm in ("full", "segmented") for i in range(5)]
    assert summary(values, few).best(task="needle") is None


def test_answers_that_agree_are_counted_on_items_that_both_answered(values):
    said = {"full": "abcd", "segmented": "abxd"}  # all of which is wrong
    results = [result(arm, i, 0.0, text=said[arm][i]) for arm in ("full", "segmented") for i in range(4)]
    results[-1] = {k: v for k, v in results[-1].items() if k not in ("score", "turns")} | {"error": {"kind": "X"}}
    made = summary(values, results)
    assert made.agreement("segmented", "full", task="needle") == pytest.approx(2 / 3)
    assert made.agreement("segmented", "full", task="other") is None


def test_figures_are_medians_with_what_is_unknown_left_out(values):
    made = summary(
        values,
        [
            result("full", 0, 1.0, prompt_tokens=100, prefill_s=2.0, answer_tokens=5, answer_s=2.0, past_bytes=1000),
            result("full", 1, 1.0, prompt_tokens=100, prefill_s=1.0, answer_tokens=1, answer_s=0.0, recall=0.5),
            result("full", 2, 1.0, prompt_tokens=100, prefill_s=4.0, recall=1.0),
        ],
    )
    assert made.figure("prefill_tokens_per_s", arm="full") == 50
    assert made.figure("answer_tokens_per_s", arm="full") == 2
    assert made.figure("past_bytes_per_token", arm="full") == 10
    assert made.figure("recall", arm="full") == 0.75
    assert made.figure("first_token_s", arm="full") is None


def test_figures_stand_in_a_table(values):
    figures = {"prompt_tokens": 65_536, "prefill_s": 12.5, "first_token_s": 0.25, "device_bytes": 2**31}
    page = html(summary(values, [result("segmented", 0, 1.0, length=65_536, **figures, past_bytes=65_536 * 128)]))
    row = re.search(r"<tr><td>65,536</td><td class=\"text\">segmented</td>(.*?)</tr>", page)[1]
    assert re.findall(r"<td>(.*?)</td>", row) == ["12.50", "5,243", "0.25", "2,048", "128"]


def test_the_report_tells_what_it_is_given_and_nothing_from_elsewhere(values):
    wrong = result("segmented", 1, 0.0, text="<b>wrong</b>", retrieved=["here & there"], recall=0.25)
    results = [result("full", 0, 1.0), result("full", 1, 1.0), result("segmented", 0, 1.0), wrong]
    results.append({"arm": "full", **{k: v for k, v in wrong.items() if k in ("task", "length", "depth", "facts")}})
    results[-1] |= {"case": "needle/100/2", "error": {"kind": "LimitExceeded", "message": "too long"}}
    page = html(summary(values, results))
    assert "100 planned = 4 scored + 1 failed + 95 left" in page
    assert "&lt;b&gt;wrong&lt;/b&gt;" in page
    assert "<b>wrong" not in page
    assert "here &amp; there" in page
    assert "1 × LimitExceeded" in page
    assert "too long" in page
    for outside in ("http://", "https://", "<script", "src=", "url("):
        assert outside not in page.replace('xmlns="http://www.w3.org', "").replace("http://www.w3.org", "").replace(
            "http://purl.org", ""
        ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "").replace("url(#", "")


@pytest.fixture(scope="module")
def arm(model_directory, values):
    model = load_model(str(model_directory), dtype="float64", device="cpu")
    config = EvalConfig.model_validate(values("x"))
    made = EngineArm(model, config.arms[1].segment_config(config.model), 2**28)
    yield made
    made.close()


TEXT = " ".join(f"Sentence {i} stands here." for i in range(36))
ITEM = Item(
    name="x",
    task="x",
    document=TEXT,
    turns=(
        Turn(question="Which?", answer="", expected=(), needed=(Span(0, 22),), lead="It is"),
        Turn(question="And which?", answer="", expected=(), needed=(Span(len(TEXT) - 20, len(TEXT)),)),
    ),
)


def test_turns_are_answered_as_if_each_were_the_only_one(arm):
    both = arm.answers(ITEM, 6, "none", False)
    alone = [arm.answers(dataclasses.replace(ITEM, turns=(turn,)), 6, "none", False)[0] for turn in ITEM.turns]
    assert [answer.text for answer in both] == [answer.text for answer in alone]
    assert [answer.prompt_tokens for answer in both] == [answer.prompt_tokens for answer in alone]
    assert all(answer.answer_tokens <= 6 for answer in both)
    assert all(answer.first_token_s > 0 and answer.prefill_s > 0 and answer.device_bytes > 0 for answer in both)


def test_a_document_is_run_once_for_all_items_that_have_it(arm):
    first, second = (dataclasses.replace(ITEM, turns=(turn,)) for turn in ITEM.turns)
    other = dataclasses.replace(ITEM, document=TEXT[1:], turns=ITEM.turns[1:])
    arm._let_go()
    runs, answers = [], []
    for item in (first, second, other, second):
        answers += arm.answers(item, 6, "none", False, shared=item is not other)
        runs.append(arm._engine.stats().counts["segments.run"])
    assert runs[1] - runs[0] < 3 < runs[2] - runs[1], "an item's own question alone, or its document too"
    assert answers[1].prefill_s == answers[0].prefill_s != answers[3].prefill_s
    assert answers[1].text == answers[3].text
    assert (answers[1].recall, answers[1].retrieved) == (answers[3].recall, answers[3].retrieved)
    assert arm._engine.stats().sessions == 1
    arm.answers(second, 6, "none", False)
    assert arm._engine.stats().sessions == 0, "nobody needs it any more"


def test_what_is_nothing_is_kept_where_it_says_something():
    """Nothing of what was needed was retrieved: left out, means of recall were those of the other answers."""
    kept = as_record(Answer(text="", recall=0.0, answer_tokens=0, prompt_tokens=3))
    assert kept == {"text": "", "recall": 0.0, "answer_tokens": 0, "prompt_tokens": 3}


def test_recall_is_of_what_the_answer_can_see(arm):
    first, second = arm.answers(ITEM, 2, "none", False)
    assert second.recall == 1  # in the open segment
    assert first.recall in np.linspace(0, 1, 23)
    seen = "".join(first.retrieved)
    assert (first.recall > 0.5) == ("Sentence 0 stands" in seen) or first.recall < 1


def test_a_lead_may_end_the_question_or_begin_the_answer(arm):
    plain, asked, begun = (arm.answers(ITEM, 4, lead, False)[0] for lead in ("none", "question", "answer"))
    assert asked.prompt_tokens > plain.prompt_tokens
    assert begun.prompt_tokens > plain.prompt_tokens


def test_documents_are_cut_only_if_asked_and_then_told(model_directory, values):

    config = EvalConfig.model_validate(values("x"))
    model = load_model(str(model_directory), dtype="float64", device="cpu")
    full = EngineArm(model, config.arms[0].segment_config(config.model), 2**28)
    try:
        with pytest.raises(LimitExceeded, match="512 at most"):
            full.answers(ITEM, 4, "none", False)
        first, second = full.answers(ITEM, 4, "none", True)
        assert first.truncated
        assert max(first.prompt_tokens, second.prompt_tokens) == 508
    finally:
        full.close()


def test_perplexity_is_told_by_position(model_directory, values, arm):
    config = EvalConfig.model_validate(values("x", tasks=[{"task": "perplexity", "lengths": [700], "items": 1}]))
    suite = open_suites(config)["perplexity"]
    (case,) = suite.cases()
    model = load_model(str(model_directory), dtype="float64", device="cpu")
    result = suite.result(case, Frame.of(model.tokenizer), arm)
    counts = {first: count for first, (_, count) in result["nats"].items()}
    assert counts == {"0": 256, "256": 256, "512": 187}  # the very first token has nothing before it
    total = sum(loss for loss, _ in result["nats"].values())
    assert result["score"] == pytest.approx(total / 699)
    line = {"arm": "full", "case": case.id, "task": "perplexity", "length": 700, "depth": None, **result}
    told = summary(values, [line], tasks=[{"task": "perplexity"}])
    assert told.perplexities("perplexity", "full")[256] == pytest.approx(math.exp(result["nats"]["256"][0] / 256))
    assert "perplexity of the tokens from each position" in html(told)


def test_perplexity_is_shown_as_itself_and_the_lower_one_wins(values):
    results = [
        {"arm": arm, "case": f"p/700/{i}", "task": "p", "length": 700, "depth": None, "facts": {}, "nats": {}}
        | {"score": math.log(perplexity) + 0.01 * (i % 3)}
        for arm, perplexity in (("full", 20.0), ("segmented", 10.0))
        for i in range(6)
    ]
    told = summary(values, results, tasks=[{"task": "perplexity", "label": "p", "lengths": [700]}])
    assert told.best("p") == "segmented"
    cell = told.as_json()["cells"][0]
    assert cell["perplexity"]["mean"] == pytest.approx(20 * math.exp(0.01))
    shown = io.StringIO()
    Console(file=shown, width=200).print(scores(told))
    for page in (html(told), shown.getvalue()):
        assert re.search(r"20\.20.*10\.10", page, re.DOTALL)
        assert "lower is better" in page
    assert "[-50.0%: -50.0% to -50.0%]" in html(told)


@pytest.mark.parametrize("task", [{"lengths": []}, {"lengths": [100], "depths": [0.1]}, {"lengths": [100], "keys": 2}])
def test_perplexity_takes_lengths_alone(values, task):
    with pytest.raises(ConfigError, match="takes lengths"):
        open_suites(EvalConfig.model_validate(values("x", tasks=[{"task": "perplexity", **task}])))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser: apt-get install chromium")
def test_the_report_can_be_looked_at(values, tmp_path):
    """In a browser: pictures are drawn, and nothing is wider than the page."""
    results = [
        result(arm, i, float(i % 2), length=length, prefill_s=1.0, prompt_tokens=length, first_token_s=0.1)
        for arm in ("full", "segmented")
        for length in (400, 700)
        for i in range(6)
    ]
    page = tmp_path / "report.html"
    counted = "document.documentElement.scrollWidth + ' ' + document.querySelectorAll('svg').length"
    probe = f"<script>document.title = {counted}</script>"
    page.write_text(html(summary(values, results)).replace("</body>", probe + "</body>"))
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,2000"]
    picture = tmp_path / "page.png"
    subprocess.run([*browser, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True, timeout=120)
    dom = subprocess.run([*browser, "--dump-dom", page.as_uri()], check=True, capture_output=True, timeout=120).stdout
    width, drawn = re.search(r"<title>(\d+) (\d+)</title>", dom.decode()).groups()
    assert int(width) <= 1100
    assert int(drawn) >= 2
    with Image.open(picture) as seen:
        assert len(seen.convert("RGB").getcolors(2**24)) > 50
