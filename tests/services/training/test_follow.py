"""What is shown of a run's log."""

from __future__ import annotations

import io
import json

from rich.console import Console

from services.follow import MARK
from services.training.follow import follow


def line(**values):
    """As Ray brings a worker's line, coloured."""
    return f"\x1b[36m(RayTrainWorker pid=1)\x1b[0m {MARK}{json.dumps(values)}\n"


def shown(*lines):
    text = io.StringIO()
    kept = []
    status = follow(lines, Console(file=text, width=200), kept.append)
    return status, text.getvalue(), kept


def test_a_run_that_ends_well():
    step = line(step=3, steps=9, loss=1.5, tokens_per_s=1234.5)
    end = line(done=True, step=9, metrics={}, checkpoint="checkpoint-0000009", export="/runs/a/export")
    status, text, kept = shown("Ray says much\n", line(note="12 records"), step, end)
    assert status == 0
    assert "12 records" in text
    assert "step 3 of 9: loss 1.5000, 1,234 tokens/s" in text
    assert "done after 9 steps; checkpoint-0000009 is exported to /runs/a/export" in text
    assert "Ray says much" not in text
    assert len(kept) == 4


def test_a_run_that_fails_says_why():
    status, text, _ = shown(line(warning="no checkpoint at step 4"), line(error="step 5: the loss is nan"))
    assert status == 1
    assert "warning: no checkpoint at step 4" in text
    assert "segcore: step 5: the loss is nan" in text


def test_a_run_that_ends_without_a_word_shows_its_last_lines():
    status, text, _ = shown(*(f"line {i}\n" for i in range(50)), MARK + "{broken\n", "ModuleNotFoundError: [torch]\n")
    assert status == 1
    assert "ModuleNotFoundError: [torch]" in text
    assert "line 10" not in text


def test_what_others_wrote_is_no_markup():
    gloo = "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    for word in ("note", "warning", "error"):
        assert gloo in shown(line(**{word: gloo}))[1]
