"""lm-evaluation-harness, driving our engine on tasks of local files, beside its own Hugging Face model."""

from __future__ import annotations

import json

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager

from segcore.errors import LimitExceeded
from services.cli import main
from services.evaluation.harness import SegcoreLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # the harness's own and its libraries'
]

ROWS = [
    {
        "text": f"Entry {i}: the café opens at {i} o'clock. " * (i + 1),
        "options": [" yes", " no indeed", "!"],
        "right": i % 3,
    }
    for i in range(4)
]
COMMON = {"test_split": "train", "doc_to_text": "{{text}}", "num_fewshot": 0, "metadata": {"version": 1}}
TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "options",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    },
    "local_answer": {
        "output_type": "generate_until",
        "doc_to_target": "right",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks as the harness reads them."""
    made = tmp_path_factory.mktemp("tasks")
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"train": str(made / "rows.jsonl")}}}
    for name, task in TASKS.items():
        (made / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **COMMON, **task}))
    return made


@pytest.fixture(scope="module")
def model(model_directory):
    made = SegcoreLM(str(model_directory), dtype="float32", device="cpu", policy="full", segment_tokens=64)
    yield made
    made.close()


def answers(folder, model, **more):
    """Every request's responses, by task."""
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=TaskManager(include_path=str(folder)), log_samples=True, **more
    )
    return {
        name: [sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
        for name, samples in found["samples"].items()
    }


def numbers(responses):
    return [float(part) for row in responses for (response,) in row for part in response]


def test_full_attention_answers_as_the_harness_own_model(folder, model, model_directory):
    ours = answers(folder, model)
    theirs = answers(folder, "hf", model_args=f"pretrained={model_directory},dtype=float32", device="cpu")
    assert numbers(ours["local_choice"]) == pytest.approx(numbers(theirs["local_choice"]), rel=1e-3)
    assert len(numbers(ours["local_choice"])) == 2 * 3 * len(ROWS)
    assert ours["local_answer"] == theirs["local_answer"]
    rolling = [[float(response) for (response,) in row] for row in (ours["local_text"], theirs["local_text"])]
    assert rolling[0] == pytest.approx(rolling[1], rel=1e-3)


def test_texts_beyond_the_positions_are_refused_but_for_rolling_likelihoods(model):
    long = "the river runs " * 100
    with pytest.raises(LimitExceeded, match="512 at most"):
        model._loglikelihood_tokens([((long, " yes"), model.tok_encode(long), [5])], disable_tqdm=True)
    tokens = model.tok_encode(long)
    windows = list(model._windows(tokens))
    assert [token for _, new in windows for token in new] == tokens
    assert max(len(context) + len(new) for context, new in windows) <= 512


def test_the_command_runs_a_local_task(folder, model_directory, capsys):
    model_args = f"pretrained={model_directory},dtype=float32,policy=streaming,segment_tokens=64,window_tokens=60"
    words = ["run", "--model", "segcore", "--model_args", model_args, "--tasks", "local_answer"]
    assert main(["lm-eval", *words, "--include_path", str(folder), "--limit", "2"]) == 0
    assert "|local_answer|" in capsys.readouterr().out.replace(" ", "")
