"""Runs: every case has one result, whatever dies or stops in between."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from contextlib import closing, nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ray import exceptions

from segcore.errors import ConfigError, FailedPrecondition
from services.evaluation import run
from services.evaluation.config import EvalConfig
from services.evaluation.results import ResultFile, read_results
from services.evaluation.run import Plan, dealt, evaluate
from services.evaluation.summary import Summary
from services.evaluation.worker import Worker


class FakePool:
    """Workers that die now and then, and finish in any order."""

    def __init__(self, seed: int, deadly: float, fatal: str | None = None) -> None:
        self._rng, self._deadly, self._fatal = random.Random(seed), deadly, fatal
        self._running: list[tuple[int, tuple[str, str]]] = []
        self.most, self.made = 0, 0

    def start(self, worker, key, case):
        if worker is None:
            self.made += 1
            worker = self.made
        assert worker not in [busy for busy, _ in self._running]
        assert case.id == key[1]
        self._running.append((worker, key))
        self.most = max(self.most, len(self._running))

    def wait(self):
        worker, key = self._running.pop(self._rng.randrange(len(self._running)))
        if key[1] == self._fatal or self._rng.random() < self._deadly:
            return None, key, None
        return worker, key, {"arm": key[0], "case": key[1], "score": 1.0}

    @property
    def busy(self):
        return bool(self._running)


@given(seed=st.integers(0, 10**6), workers=st.integers(1, 5), deadly=st.sampled_from([0.0, 0.2, 0.7]))
@settings(max_examples=30, deadline=None)
def test_every_case_has_one_result_whoever_dies(tmp_path_factory, values, seed, workers, deadly):
    changed = {"workers": {"count": workers, "failures": 3}}
    plan = Plan.of(EvalConfig.model_validate(values(tmp_path_factory.getbasetemp(), **changed)))
    pool = FakePool(seed, deadly)
    done = list(dealt(plan, plan.keys, pool))
    assert sorted((r["arm"], r["case"]) for r in done) == sorted(plan.keys)
    assert pool.most <= workers
    given_up = [r for r in done if "error" in r]
    assert not given_up or deadly > 0
    assert all("4 workers died" in r["error"]["message"] for r in given_up)


def test_a_case_that_kills_is_given_up_alone(config):
    plan = Plan.of(config)
    fatal = next(iter(plan.cases))
    done = list(dealt(plan, plan.keys, FakePool(0, 0.0, fatal)))
    assert [r["case"] for r in done if "error" in r] == [fatal] * len(config.arms)
    assert len(done) == len(plan.keys)


def test_cells_come_to_their_end_together(tmp_path, values):
    tasks = [
        {"task": "needle", "label": "many", "lengths": [500], "items": 8},
        {"task": "needle", "label": "few", "lengths": [600, 700], "items": 4},
    ]
    plan = Plan.of(EvalConfig.model_validate(values(tmp_path, tasks=tasks)))
    first_half = plan.keys[:8]
    of_cell = Counter(plan.cases[case][:2] for _, case in first_half)
    assert of_cell == {("many", 500): 4, ("few", 600): 2, ("few", 700): 2}
    assert len(set(plan.keys)) == len(plan.keys) == 16 * len(plan.config.arms)


def test_a_document_is_read_by_one_worker_while_others_have_theirs(tmp_path, values):
    row = {"context": "A book.", "input": "Who?", "answer": "Ann"}
    rows = [row | {"context": f"Book {i % 4}."} for i in range(20)]
    (tmp_path / "longbook_qa_eng.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "infinitebench", "data": str(tmp_path / "longbook_qa_eng.jsonl")}
    plan = Plan.of(EvalConfig.model_validate(values(tmp_path, tasks=[task], workers={"count": 3})))
    pool, read = FakePool(1, 0.0), {}

    def start(worker, key, case):
        FakePool.start(pool, worker, key, case)
        read.setdefault(pool._running[-1][0], []).append(plan.document(key))

    pool.start = start
    assert len(list(dealt(plan, plan.keys, pool))) == 40
    changes = sum(a != b for documents in read.values() for a, b in pairwise([None, *documents]))
    # Eight of them, by arm; at an arm's end workers without one of their own help the others.
    assert 8 <= changes <= 8 + 2 * 2


@pytest.mark.parametrize("error", [exceptions.RayActorError(), exceptions.OutOfMemoryError("by Ray's monitor")])
def test_a_worker_that_died_has_no_result(config, monkeypatch, error):
    def lost(future):
        raise error

    monkeypatch.setattr("ray.wait", lambda futures: (futures, []))
    monkeypatch.setattr("ray.get", lost)
    pool = run._Pool(config)
    pool._busy = {"a future": ("an actor", ("full", "a case"))}
    assert pool.wait() == (None, ("full", "a case"), None)
    assert not pool.busy


def test_making_a_worker_fails_for_nothing_so_that_it_can_say_what_is_wrong(tmp_path, values):
    missing = {"task": "longbench", "data": str(tmp_path / "gone.jsonl")}
    worker = Worker(EvalConfig.model_validate(values(tmp_path, tasks=[missing])).model_dump(mode="json"))
    with pytest.raises(ConfigError, match=r"gone\.jsonl isn't a readable"):
        worker.run("full", ("longbench", 0, None, 0))
    worker.close()


def in_process(monkeypatch, fail_after=None):
    """Cases are done here, one after the other; after so many, the run is interrupted."""
    made = []

    class Pool:
        def __init__(self, config):
            self._worker, self._waiting = Worker(config.model_dump(mode="json")), []
            made.append(self._worker)

        def start(self, worker, key, case):
            self._waiting.append((key, case))

        def wait(self):
            nonlocal fail_after
            if fail_after == 0:
                raise KeyboardInterrupt
            fail_after = None if fail_after is None else fail_after - 1
            key, case = self._waiting.pop()
            return self._worker, key, self._worker.run(key[0], tuple(case))

        @property
        def busy(self):
            return bool(self._waiting)

    monkeypatch.setattr(run, "_Pool", Pool)
    monkeypatch.setattr(run, "_ray", lambda config, address: nullcontext())
    return made


def test_a_run_counts_what_it_planned_scored_and_failed(config, monkeypatch):
    made, told = in_process(monkeypatch), []
    folder = evaluate(config, on_result=lambda done, total, arm: told.append((done, total)))
    made[0].close()
    summary = Summary.read(folder)
    # Of 700 tokens, the full arm's 512 positions hold none.
    assert summary.counts == {"planned": 8, "scored": 6, "failed": 2, "left": 0}
    assert summary.failures(arm="full") == {"LimitExceeded": 2}
    assert summary.failures(arm="segmented") == {}
    assert told == [(i, 8) for i in range(9)]
    assert folder.name == config.run_id


def test_a_run_that_was_interrupted_goes_on_where_it_was(config, monkeypatch, tmp_path):
    made = in_process(monkeypatch, fail_after=3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    file = config.folder / run.RESULTS
    before = file.read_text()
    assert before.count("\n") == 3
    file.write_text(before + '{"arm": "full", "ca')  # a crash while it was written
    made += in_process(monkeypatch)
    evaluate(config)
    after = file.read_text()
    assert after.startswith(before)
    lines = [json.loads(line) for line in after.splitlines()]
    assert len({(r["arm"], r["case"]) for r in lines}) == len(lines) == 8

    other = config.model_copy(update={"storage": tmp_path / "whole"})
    made += in_process(monkeypatch)
    evaluate(other)
    for worker in made:
        worker.close()
    results = {(r["arm"], r["case"]): r for r in lines}
    for key, result in read_results(other.folder / run.RESULTS).items():
        assert result.get("scores") == results[key].get("scores")
        assert [turn["text"] for turn in result.get("turns", ())] == [t["text"] for t in results[key].get("turns", ())]


def test_a_finished_run_is_not_asked_again(config, monkeypatch):
    made = in_process(monkeypatch)
    evaluate(config)
    made[0].close()
    evaluate(config)
    assert len(made) == 1


def test_changed_data_are_refused(config, monkeypatch, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Sentence {i} says little. " for i in range(3000)))
    changed = config.model_copy(update={"haystack": str(text)})
    made = in_process(monkeypatch)
    evaluate(changed)
    made[0].close()
    text.write_text(text.read_text() + "One more. " * 600)
    from segcore.tasks import haystack

    haystack._named.cache_clear()
    with pytest.raises(ConfigError, match="data of needle have changed"):
        evaluate(changed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense\n", ":1 isn't a result"),
        ('{"arm": "a"}\n', ":1 isn't a result"),
        ('{"arm": "a", "case": "b"}\n' * 2, ":2: .* is there twice"),
    ],
)
def test_results_that_were_damaged_are_told_with_their_line(tmp_path, text, message):
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        ResultFile(tmp_path / "r.jsonl")


def test_results_that_still_come_are_left_alone(config):
    """A report in the midst of a run changes nothing, and no second run adds to the same results."""
    path = config.folder / run.RESULTS
    with closing(ResultFile(path)) as file:
        file.add({"arm": "full", "case": "a"})
        with open(path, "ab") as other:
            other.write(b'{"arm": "fu')
        assert list(read_results(path)) == [("full", "a")]
        assert path.read_bytes().endswith(b'{"arm": "fu')
        with pytest.raises(FailedPrecondition, match="another process is at work"):
            evaluate(config)
    with closing(ResultFile(path)):
        assert path.read_text().count("\n") == 1
        assert path.read_bytes().endswith(b"\n")


def test_results_of_other_cases_are_refused(config):
    with closing(ResultFile(config.folder / run.RESULTS)) as file:
        file.add({"arm": "full", "case": "needle/1/0"})
    with pytest.raises(ConfigError, match="other cases"):
        evaluate(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "tasks"),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "a: the name is there twice"),
        ({"baseline": "b"}, "there is no arm 'b'"),
        ({"arms": [{"name": "a", "segment": {"policy": "fulll"}}]}, "arm 'a': unknown policy"),
        ({"arms": [{"name": "a", "service": "h:1", "dtype": "float32"}]}, "dtype: the service's own choice"),
        ({"arms": [{"name": "a", "url": "http://h"}]}, "go together"),
        (
            {"arms": [{"name": "a", "service": "h:1"}], "tasks": [{"task": "needle", "lead": "answer"}]},
            "beginning of its",
        ),
        ({"seeed": 1}, "seeed"),
    ],
)
def test_wrong_configurations_are_told(tmp_path, values, changes, message):
    with pytest.raises(ValidationError, match=message):
        EvalConfig.model_validate(values(tmp_path, **changes))


def test_what_was_validated_can_be_written_and_read_again(tmp_path, values):
    arms = [{"name": "a", "service": "h:1"}, {"name": "b", "url": "http://h", "served_model": "m"}]
    config = EvalConfig.model_validate(values(tmp_path, arms=arms))
    assert EvalConfig.model_validate(config.model_dump(mode="json")) == config
    assert EvalConfig.model_validate_json(config.to_json()).run_id == config.run_id


def test_paths_beside_the_file_become_absolute(tmp_path, values):
    (tmp_path / "text.md").write_text("A text.")
    (tmp_path / "rows.jsonl").write_text("")
    made = values("runs", haystack="./text.md", tasks=[{"task": "longbench", "data": "rows.jsonl"}])
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(made))
    config = EvalConfig.read(tmp_path / "eval.yaml")
    assert config.haystack == str(tmp_path / "text.md")
    assert config.tasks[0].options == {"data": str(tmp_path / "rows.jsonl")}
    assert config.storage == tmp_path / "runs"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"task": "nedle", "lengths": [100]}, "unknown task 'nedle'"),
        ({"task": "needle"}, "say of what lengths"),
        ({"task": "needle", "lengths": [100], "key": 2}, "no option key"),
        ({"task": "tracking", "lengths": [100], "depths": [0.5]}, "no option depth"),
    ],
)
def test_wrong_tasks_are_told(tmp_path, values, task, message):
    with pytest.raises(ConfigError, match=message):
        Plan.of(EvalConfig.model_validate(values(tmp_path, tasks=[task])))


class Dying(Worker):
    """Dies once over the third case, as if by the kernel's hand."""

    def run(self, arm, case):
        mark = Path(self._config.storage) / "died"
        if case[3] == 1 and not mark.exists():
            mark.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(arm, case)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_worker_that_is_killed_is_replaced(tmp_path, values, monkeypatch):
    """On a real local Ray, with two workers."""
    monkeypatch.setattr("services.evaluation.worker.Worker", Dying)
    small = {"task": "needle", "lengths": [400], "items": 3, "max_tokens": 2, "forms": ["diary"]}
    changes = {"tasks": [small], "workers": {"count": 2, "cpus": 0.1, "threads": 1}}
    config = EvalConfig.model_validate(values(tmp_path, **changes))
    summary = Summary.read(evaluate(config))
    assert (tmp_path / "died").exists()
    assert summary.counts == {"planned": 6, "scored": 6, "failed": 0, "left": 0}
