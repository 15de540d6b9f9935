"""lm-evaluation-harness, driving our engine, on requests and on tasks of local files."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

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


def asked(*args):
    return SimpleNamespace(args=args)


def test_full_attention_answers_as_the_models_own_code(model, model_directory):
    own = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    pairs = [(row["text"].strip(), option) for row in ROWS for option in row["options"]]
    found = model.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    texts = model.loglikelihood_rolling([asked(row["text"]) for row in ROWS], disable_tqdm=True)
    until = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    said = model.generate_until([asked(row["text"], until) for row in ROWS], disable_tqdm=True)

    def likelihood(context, continuation):
        tokens = torch.tensor([[*context, *continuation]])
        told = own(tokens).logits[0, len(context) - 1 : -1].log_softmax(-1)
        return told.gather(1, tokens[0, len(context) :, None]).sum().item(), told.argmax(-1).tolist() == continuation

    encode = model.tok_encode
    for (context, continuation), (number, greedy) in zip(pairs, found, strict=True):
        wanted, best = likelihood(encode(context), encode(continuation))
        assert (number, greedy) == (pytest.approx(wanted, rel=1e-4), best)
    for row, number, answer in zip(ROWS, texts, said, strict=True):
        tokens = encode(row["text"])
        assert number == pytest.approx(likelihood([model.prefix_token_id], tokens)[0], rel=1e-4)
        made = own.generate(torch.tensor([tokens]), max_new_tokens=6, do_sample=False)[0, len(tokens) :]
        assert answer.rstrip("\ufffd") == model.tokenizer.decode(made, skip_special_tokens=True).rstrip("\ufffd")


def test_texts_beyond_the_positions_are_refused_but_for_rolling_likelihoods(model):
    long = "the river runs " * 100
    with pytest.raises(LimitExceeded, match="512 at most"):
        model._loglikelihood_tokens([((long, " yes"), model.tok_encode(long), [5])], disable_tqdm=True)
    tokens = model.tok_encode(long)
    windows = list(model._windows(tokens))
    assert [token for _, new in windows for token in new] == tokens
    assert max(len(context) + len(new) for context, new in windows) <= 512


def test_the_command_runs_a_local_task(folder, model_directory, capsys, monkeypatch):
    # Its own thousands of tasks take a minute to list.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    model_args = f"pretrained={model_directory},dtype=float32,policy=streaming,segment_tokens=64,window_tokens=60"
    words = ["run", "--model", "segcore", "--model_args", model_args, "--tasks", ",".join(TASKS)]
    assert main(["lm-eval", *words, "--include_path", str(folder)]) == 0
    shown = capsys.readouterr().out.replace(" ", "")
    assert all(f"|{name}|" in shown for name in TASKS)
