"""RULER's tasks beside the package's own scripts, on the same seed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from segcore.errors import ConfigError
from segcore.text import TextTokenizer
from segcore.weights import load_model
from services.evaluation.config import EvalConfig
from services.evaluation.tasks.base import Frame
from services.evaluation.tasks.registry import open_suites
from services.evaluation.tasks.ruler import words
from services.evaluation.tasks.ruler.suite import MAKERS
from services.evaluation.tasks.ruler.words import essay_words, sentences_of
from tests.tokenizers import byte_tokenizer, counting_tokenizer

# What their scripts import and we don't install; sentences are cut by our rule.
STUBS = {
    "nltk/__init__.py": "",
    "nltk/tokenize.py": "import re\ndef sent_tokenize(text): return re.split(r'(?<=[.!?])\\s+', text)\n",
    "tenacity.py": "def retry(*a, **k): return id\nstop_after_attempt = wait_fixed = wait_random = lambda *a: 0\n",
    "scipy/__init__.py": "",
    "scipy/special.py": "def zeta(alpha): assert alpha == 2.0; return 1.6449340668482264\n",
}
# A few of the words, for their millions of pairs take a minute to sort. "well" and "well-kept" sort together.
FEW = {
    "adjective": ["well", "well-kept", *(f"a{i}" for i in range(40))],
    "noun": [f"n{i * 37 % 101}" for i in range(101)],
    "verb": [f"v{i}" for i in range(200)],
}
STUBS |= {
    "wonderwords/__init__.py": "from wonderwords import random_word\n",
    "wonderwords/random_word.py": f"WORDS = {FEW!r}\ndef _get_words_from_text_file(f): return WORDS[f[:-8]]\n",
}
# Runs scripts as they are asked for, each in a process of its own that needn't import anew what all of them do.
RUNNER = """
import json, os, runpy, sys
import nltk.tokenize, numpy, transformers, wonderwords
import long_context_eval.data.tokenizer, long_context_eval.pred.nemo_utils
for line in sys.stdin:
    script, errors, *sys.argv[1:] = json.loads(line)
    if child := os.fork():
        print(os.waitpid(child, 0)[1], flush=True)
        continue
    sys.argv[0], sys.stderr = script, open(errors, "w")
    sys.path.insert(0, os.path.dirname(script))
    sys.stdout = sys.stderr
    runpy.run_path(script, run_name="__main__")
    break
"""
SCRIPTS = {"niah": "niah", "vt": "variable_tracking", "cwe": "common_words_extraction", "fwe": "freq_words_extraction"}
ARGUMENTS = {
    "niah_single_1": ("repeat", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 1, 1, 4),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Runs one of their scripts; its lines."""
    folder = tmp_path_factory.mktemp("ruler")
    for name, text in STUBS.items():
        (folder / "stubs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "stubs" / name).write_text(text)
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    counting_tokenizer().save_pretrained(folder / "vt-tokenizer")  # whose example must have room in 500 tokens
    package = importlib.util.find_spec("long_context_eval")
    assert package is not None, "run: make setup"
    root = Path(package.submodule_search_locations[0]) / "data" / "synthetic"
    constants = {}
    exec((root / "constants.py").read_text(), constants)
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        env={"PYTHONPATH": str(folder / "stubs"), "PATH": "/usr/bin:/bin"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert runner.stdin is not None
    assert runner.stdout is not None

    def run(task: str, length: int, samples: int) -> list[dict]:
        kind = task.split("_")[0]
        base = constants["TASKS"]["qa" if kind == "qa" else SCRIPTS[kind]]
        options = {
            "save_dir": folder,
            "save_name": f"{task}-{length}",
            "tokenizer_path": folder / ("vt-tokenizer" if kind == "vt" else "tokenizer"),
            "tokenizer_type": "hf",
            "max_seq_length": length,
            "tokens_to_generate": base["tokens_to_generate"],
            "num_samples": samples,
            "random_seed": 42,
            "template": base["template"] + base["answer_prefix"],
        }
        if kind == "niah":
            names = ("type_haystack", "type_needle_k", "type_needle_v", "num_needle_k", "num_needle_v", "num_needle_q")
            options |= dict(zip(names, ARGUMENTS[task], strict=True))
        if kind == "qa":
            options["dataset"] = {"qa_1": "squad", "qa_2": "hotpotqa"}[task]
        script = root / ("qa.py" if kind == "qa" else f"{SCRIPTS[kind]}.py")
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        runner.stdin.write(json.dumps([str(script), str(folder / "errors"), *words]) + "\n")
        runner.stdin.flush()
        status = runner.stdout.readline().strip()
        assert status == "0", (folder / "errors").read_text()[-2000:]
        lines = (folder / options["save_name"] / "validation.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    yield run
    runner.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "length"),
    [(task, 30_000 if task.startswith("qa") else 6000) for task in MAKERS]
    + [("niah_single_1", 3000), ("cwe", 4000), ("niah_multikey_3", 9000), ("vt", 2000)],
)
def test_the_same_seed_gives_their_samples(theirs, task, length, monkeypatch):
    monkeypatch.setattr(words, "_listed", FEW.__getitem__)
    words.pairs_of_words.cache_clear()
    words.all_words.cache_clear()
    text = TextTokenizer(byte_tokenizer()).encode if task != "vt" else counting_tokenizer().encode
    ours = list(islice(MAKERS[task](length, lambda piece: len(text(piece))).samples(), 3))
    made = theirs(task, length, 3)
    assert [list(sample.answers) for sample in ours] == [line["outputs"] for line in made]
    for sample, line in zip(ours, made, strict=True):
        assert sample.prompt == line["input"]
    words.pairs_of_words.cache_clear()
    words.all_words.cache_clear()


def test_items_are_the_samples_in_their_order(values, model_directory):
    made = values("x", tasks=[{"task": "niah_multikey_2", "lengths": [4500], "items": 3, "lead": "question"}])
    suites = [open_suites(EvalConfig.model_validate(made))["niah_multikey_2"] for _ in range(2)]
    frame = Frame.of(load_model(str(model_directory), device="cpu").tokenizer)
    cases = suites[0].cases()
    forwards = [suites[0].item(case, frame) for case in cases]
    backwards = [suites[1].item(case, frame) for case in reversed(cases)]
    assert backwards[::-1] == forwards
    assert len({item.document for item in forwards}) == 3
    for item in forwards:
        (turn,) = item.turns
        assert turn.expected[0] in item.document
        assert turn.question.startswith("What is the special magic number for")
        assert turn.lead.startswith("The special magic number for")


@pytest.mark.parametrize(("task", "length"), [("niah_single_1", 200), ("vt", 4000)])
def test_a_length_too_short_is_told(task, length):
    """By characters, RULER's example of variable tracking finds no room in its 500."""
    with pytest.raises(ConfigError, match="too few for RULER"):
        next(MAKERS[task](length, len).samples())


def test_sentences_are_cut_as_far_as_a_rule_can():
    assert sentences_of("One. Two? Three! 3.5 is a number.") == ["One.", "Two?", "Three!", "3.5 is a number."]
    assert len(essay_words()) > 100_000
