"""Do the shipped selectors rank what is needed in streams they weren't chosen on? Other text, other facts, other seed.

.venv/bin/python -m benchmarks.selector_ranking   # some ten minutes; writes benchmarks/results/selector_ranking.json
"""

from __future__ import annotations

import math
import random
import statistics

import segcore
from benchmarks.record import records, write
from segcore.config import Cell
from segcore.heads.detect import Sighting, look, recall, reciprocal_ranks
from segcore.heads.probes import ADJECTIVES, NAMES, NOUNS, PLACES, ProbeConfig, ProbeMaker, Template
from segcore.tasks.haystack import Haystack

COMMAND = "-m benchmarks.selector_ranking"
SEGMENT = segcore.segment_preset(segcore.DEFAULT_MODEL)
# The two best cells by copying, which the prototype took, and what ships.
SETS = {"copying": (Cell(17, 1), Cell(18, 2)), "shipped": SEGMENT.selectors}


def person(rng: random.Random) -> str:
    return f"{rng.choice(NAMES)} {rng.choice(PLACES)}"


def ship(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES).capitalize()} {rng.choice(NOUNS).capitalize()}"


def cargo(rng: random.Random) -> str:
    return " and ".join(f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}s" for _ in range(2))


TEMPLATES = (
    Template(
        "telephone",
        "The telephone number of {key} is",
        "How can one reach {key} by telephone?",
        "The telephone number of {key} is",
        person,
        lambda rng: f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}",
    ),
    Template(
        "voyage",
        "That spring the ship {key} sailed with a cargo of",
        "What did the ship {key} carry?",
        "The ship {key} sailed with a cargo of",
        ship,
        cargo,
    ),
    Template(
        "setting",
        "{key} =",
        "What is the value of {key}?",
        "The value of {key} is",
        lambda rng: f"{rng.choice(NOUNS)}_{rng.choice(NOUNS)}",
        lambda rng: str(rng.randint(10_000, 99_999)),
    ),
)
PROBES = ProbeConfig(
    templates=TEMPLATES, lengths=(1500, 3000, 6000), depths=tuple((i + 0.5) / 8 for i in range(8)), rounds=2, seed=1
)


def sightings() -> list[Sighting]:
    model = segcore.load_model(device="cpu")
    essays = Haystack.named("essays")
    maker = ProbeMaker(model.tokenizer, model.chat, essays, SEGMENT.sink_tokens, SEGMENT.reader_tail_tokens)
    seen: list[Sighting] = []
    for stream in maker.streams(PROBES):
        seen += look(model.lm, stream, window_tokens=SEGMENT.query_window_tokens)
        print(f"{stream.template}, {stream.length} tokens: {len(seen)} questions so far", flush=True)
    return seen


def figures(seen: list[Sighting], kv_heads: int) -> list[tuple[str, float, str]]:
    """Name, value and unit of each figure."""
    values, ranks = [], {}
    for name, cells in SETS.items():
        rows = [layer * kv_heads + head for layer, head in cells]
        sums = [(s.scores_CN[rows].sum(dim=0), s.question) for s in seen]
        block = SEGMENT.block_tokens
        ranks[name] = [float(reciprocal_ranks(score_N[None], question, block)) for score_N, question in sums]
        values.append((f"{name}_reciprocal_rank", statistics.mean(ranks[name]), "mean over questions"))
        for budget in (128, 256, 512):
            share = statistics.mean(recall(score_N, question, budget, block) for score_N, question in sums)
            values.append((f"{name}_recall_{budget}", share, "share of the needle's tokens"))
    gains = [new - old for new, old in zip(ranks["shipped"], ranks["copying"], strict=True)]
    values.append(("shipped_minus_copying", statistics.mean(gains), "reciprocal rank"))
    values.append(("its_standard_error", statistics.stdev(gains) / math.sqrt(len(gains)), "reciprocal rank"))
    return [*values, ("questions", len(seen), "")]


if __name__ == "__main__":
    values = figures(sightings(), kv_heads=3)
    write("selector_ranking", records(COMMAND, [(*value, None, None) for value in values]))
