"""Whatever goes wrong, counts add up: planned = scored + failed + left, and what is left is asked later."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from segcore.engine.runner import Runner
from segcore.errors import ConfigError, Unavailable
from services.evaluation import endpoint, run, worker
from services.evaluation.config import EvalConfig
from services.evaluation.results import read_results
from services.evaluation.run import evaluate
from services.evaluation.summary import Summary
from tests.services.evaluation.test_endpoint import Handler, url  # noqa: F401 - a fixture
from tests.services.evaluation.test_run import in_process

SMALL = {"task": "needle", "lengths": [400], "items": 3, "max_tokens": 2, "forms": ["diary"]}


@pytest.fixture
def local(monkeypatch):
    """Cases are done in this process; the workers that did them are closed at the end."""
    made = in_process(monkeypatch)
    yield made
    for each in made:
        each.close()


def counts(config: EvalConfig) -> dict[str, int]:
    found = Summary.read(config.folder).counts
    assert found["planned"] == found["scored"] + found["failed"] + found["left"] == 3
    file = config.folder / run.RESULTS
    lines = file.read_text().splitlines() if file.exists() else []
    assert len({json.loads(line)["case"] for line in lines}) == len(lines) == found["scored"] + found["failed"]
    return {name: n for name, n in found.items() if n and name != "planned"}


@pytest.mark.parametrize(
    ("moods", "then"),
    [
        (["500", "500"], {"scored": 3}),  # asked again until it answers
        (["400"], {"scored": 2, "failed": 1}),  # its own refusal of one item
        (["good", *["500"] * 3], {"scored": 1, "left": 2}),  # gone after the first
        (["good", *["slow"] * 3], {"scored": 1, "left": 2}),
        (["good", "short"], {"scored": 1, "left": 2}),
    ],
)
def test_an_endpoint_that_is_slow_wrong_or_gone(tmp_path, values, local, url, moods, then):  # noqa: F811
    arm = {"name": "other", "url": url, "served_model": "a-model", "timeout_s": 0.3}
    config = EvalConfig.model_validate(values(tmp_path, tasks=[SMALL], arms=[arm]))
    Handler.moods = list(moods)
    if "left" in then:
        with pytest.raises(Unavailable):
            evaluate(config)
        assert counts(config) == then
        Handler.moods = []
        evaluate(config)
        assert counts(config) == {"scored": 3}
    else:
        evaluate(config)
        assert counts(config) == then


def test_an_endpoint_without_the_model(tmp_path, values, local, url, monkeypatch):  # noqa: F811
    arm = {"name": "other", "url": url, "served_model": "b-model"}
    config = EvalConfig.model_validate(values(tmp_path, tasks=[SMALL], arms=[arm]))
    with pytest.raises(ConfigError, match="and not 'b-model'"):
        evaluate(config)
    assert counts(config) == {"left": 3}
    assert endpoint.RETRY_S == (0.0, 0.0)


def test_a_tokenizer_without_a_chat_template(tmp_path, values, local, model_directory):
    plain = tmp_path / "plain"
    shutil.copytree(model_directory, plain)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    arms = [{"name": "full", "segment": {"policy": "full", "segment_tokens": 64}}]
    tasks = [SMALL | {"lead": "answer"}]
    config = EvalConfig.model_validate(values(tmp_path, model=str(plain), tasks=tasks, arms=arms))
    evaluate(config)
    assert counts(config) == {"scored": 3}
    results = read_results(config.folder / run.RESULTS).values()
    assert all(result["turns"][0]["prompt_tokens"] + 2 <= 400 for result in results)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no more")])
def test_a_model_that_is_too_large(tmp_path, values, local, monkeypatch, error):
    arms = [{"name": "full", "segment": {"policy": "full", "segment_tokens": 64}}]
    config = EvalConfig.model_validate(values(tmp_path, tasks=[SMALL], arms=arms))

    def too_large(*_, **__):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(worker, "EngineArm", too_large)
        with pytest.raises(ConfigError, match=r"arm 'full': .* is too large for a worker's memory"):
            evaluate(config)
    assert counts(config) == {"left": 3}
    evaluate(config)
    assert counts(config) == {"scored": 3}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_an_item_that_is_too_large_is_a_failure_of_its_own(tmp_path, values, local, monkeypatch, error):
    """Whether the engine finds that out or a text's reading; the next one has the memory to itself."""
    tasks = [SMALL | {"items": 2}, {"task": "perplexity", "lengths": [100], "items": 1}]
    arms = [{"name": "full", "segment": {"policy": "full", "segment_tokens": 64}}]
    config = EvalConfig.model_validate(values(tmp_path, tasks=tasks, arms=arms))
    hidden, passes = Runner.hidden, []

    def too_large(self, *args, **more):
        passes.append(args)
        if len(passes) == 2 or local[0]._arm[1]._engine.stats().sessions == 0:  # of the first item; of the text
            raise error
        return hidden(self, *args, **more)

    monkeypatch.setattr(Runner, "hidden", too_large)
    evaluate(config)
    assert counts(config) == {"scored": 1, "failed": 2}
    assert Summary.read(config.folder).failures(task="needle") == {"LimitExceeded": 1}
    assert Summary.read(config.folder).failures(task="perplexity") == {"OutOfMemory": 1}
    messages = [r["error"]["message"] for r in Summary.read(config.folder).results if "error" in r]
    assert all(str(error) in message for message in messages)


def test_other_code_of_tasks_is_another_run(tmp_path, values, local, monkeypatch):
    """What was judged by one code is never merged with what another one judged."""
    arms = [{"name": "full", "segment": {"policy": "full", "segment_tokens": 64}}]
    config = EvalConfig.model_validate(values(tmp_path, tasks=[SMALL], arms=arms))
    evaluate(config)
    before = config.folder
    monkeypatch.setattr("services.evaluation.config.code_digest", lambda: "other")
    assert config.folder != before
    evaluate(config)
    assert counts(config) == {"scored": 3}
    assert Summary.read(before).run_id == before.name
