"""The demo's own part: which document is asked about. The service behind it is tests/e2e's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "demo.py"
FACT = "The cat's name is Ada."


@pytest.fixture
def demo(monkeypatch):
    """Runs it with some words; what `segcore ask` would be asked, and of which text."""
    spec = importlib.util.spec_from_file_location("demo", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asked = []
    monkeypatch.setattr(module, "main", lambda words: asked.append((words[2], Path(words[1]).read_text())) or 0)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, words)])
        assert module.run() == 0
        return asked.pop()

    return run


@pytest.mark.parametrize("at", [0.0, 0.25, 1.0])
def test_a_fact_of_ones_own_is_hidden_where_one_likes(demo, at):
    plain = demo()[1]
    question, text = demo("--hide", FACT, "--at", at, "--question", "What is it?")
    assert question == "What is it?"
    assert text.replace(f"{FACT} ", "") == plain
    assert text.index(FACT) / len(plain) == pytest.approx(at, abs=0.01)


def test_a_fact_is_hidden_in_ones_own_document(demo, tmp_path):
    (tmp_path / "book.txt").write_text("One. Two. Three.")
    assert demo("--document", tmp_path / "book.txt", "--hide", FACT, "--question", "?")[1] == f"One. Two. {FACT} Three."
    assert demo("--document", tmp_path / "book.txt")[1] == "One. Two. Three."


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--hide", FACT], "what is hidden must be asked for"),
        (["--at", "0.5"], "name it with --hide"),
        (["--hide", FACT, "--question", "?", "--at", "1.5"], "must lie between 0"),
        (["--hide", FACT, "--question", "?", "--document", "nowhere.txt"], "isn't a readable UTF-8 text"),
    ],
)
def test_what_cannot_be_is_told(demo, capsys, words, told):
    with pytest.raises(SystemExit):
        demo(*words)
    assert told in capsys.readouterr().err
