"""The real model finds what it can no longer see: needles in prose, at lengths that aren't multiples of the segment.

Each stream is prefilled once; a fork of it is asked for each of its needles.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

import segcore
from segcore.engine.engine import Engine
from segcore.errors import SegcoreError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STREAMS = {3500: 1, 5300: 1}  # how many, by length in tokens
NEEDLES = 3  # in each
INTRODUCTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it."
    " I will quiz you about the numbers afterwards.\n"
)
KEYS = [
    "blue-river",
    "quiet-lamp",
    "tall-garden",
    "brave-violin",
    "amber-forest",
    "silly-engine",
    "old-castle",
    "red-horse",
]


@pytest.fixture(scope="module", autouse=True)
def _all_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(psutil.cpu_count(logical=False) or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> segcore.LoadedModel:
    try:
        return segcore.load_model(device="cpu")
    except SegcoreError as error:
        pytest.fail(f"the default model is part of the set-up (make setup): {error.message}")


def essays_from(index: int) -> str:
    """Essays, as RULER's own data file has them, from another place for each stream."""
    package = importlib.util.find_spec("long_context_eval")
    assert package is not None, "run: make setup"
    assert package.submodule_search_locations
    data = Path(package.submodule_search_locations[0]) / "data" / "synthetic" / "json" / "PaulGrahamEssays.json"
    return str(json.loads(data.read_text())["text"])[100_000 * index :]


@dataclass(frozen=True)
class Question:
    """Tokens up to the turn mark, tokens after it, and the number that answers them."""

    turn: list[int]
    after_mark: list[int]
    number: str


def needles(model: segcore.LoadedModel, length: int, index: int) -> tuple[list[int], list[Question]]:
    """A document and the questions about its needles, which are older than tail and segment when they are asked."""
    encode, rng = model.tokenizer.encode_continuation, random.Random(1000 * length + index)
    hidden, questions = [], []
    for i in range(NEEDLES):
        key, number = KEYS[(NEEDLES * index + i) % len(KEYS)], str(rng.randint(10_000, 99_999))
        hidden.append(encode(f" One of the special magic numbers for {key} is: {number}."))
        turn = encode(f"\nWhat is the special magic number for {key} mentioned in the provided text?")
        lead = encode(f"The special magic number for {key} mentioned in the provided text is")
        questions.append(Question(turn + model.chat.end_of_user, model.chat.header + lead, number))
    frame = [*model.chat.head, *encode(INTRODUCTION)]
    room = length - len(frame) - sum(map(len, hidden)) - max(len(question.turn) for question in questions)
    filler = encode(essays_from(index)[: 6 * room])[:room]
    # Depths spread evenly over what neither the segment nor any tail holds at the end.
    depths = [(i + (index + 0.5) / STREAMS[length]) / NEEDLES for i in range(NEEDLES)]
    places = [int(depth * (1 - 1800 / length) * room) for depth in depths]
    body: list[int] = []
    for needle, start, end in zip([[], *hidden], [0, *places], [*places, room], strict=True):
        body += [*needle, *filler[start:end]]
    return frame + body, questions


def answer(engine: Engine, session: str, question: Question) -> list[int]:
    """Twelve tokens, greedily."""
    tokens: list[int] = []

    def on_token(token: int) -> bool:
        tokens.append(token)
        return False

    engine.append(session, question.turn)
    engine.mark(session)
    engine.append(session, question.after_mark)
    asked = segcore.Generation(segcore.SamplingParams(max_tokens=12), on_token)
    engine.generate(session, asked)
    asked.done.result(300)
    return tokens


def found(model: segcore.LoadedModel, segment: segcore.SegmentConfig) -> int:
    """How many questions are answered with a number that was hidden. Which of two belongs to a key asks more of so
    small a model than that it has seen them."""
    engine, hits = Engine(model.lm, segcore.EngineConfig(segment=segment)), 0
    for length, index in ((length, i) for length, count in STREAMS.items() for i in range(count)):
        document, questions = needles(model, length, index)
        engine.open("s")
        engine.append("s", document)
        engine.flush("s").result(300)
        for question in questions:
            asked_at = len(document) + len(question.turn)
            assert length - 40 < asked_at <= length
            assert asked_at % segment.segment_tokens
            engine.fork("s", "asked")
            text = model.tokenizer.tokenizer.decode(answer(engine, "asked", question))
            hits += any(hidden.number in text for hidden in questions)
            engine.close("asked")
        engine.close("s")
    engine.shutdown()
    return hits


def test_retrieval_finds_needles_that_local_cells_cannot_see(model):
    preset = segcore.segment_preset(segcore.DEFAULT_MODEL)
    with_past = found(model, preset)
    local_only = found(model, dataclasses.replace(preset, retrieved_tokens=0, selectors=()))
    assert local_only <= 1
    assert with_past >= local_only + 3, f"found {with_past} with retrieval, {local_only} with local cells alone"
