"""Variable tracking: a chain of assignments, spread over one sentence that is repeated."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from string import ascii_uppercase

import numpy as np

from segcore.errors import ConfigError
from services.evaluation.tasks.ruler.base import SEED, Count, Maker, Sample
from services.evaluation.tasks.ruler.words import NOISE

HOPS = 4
# The example's length, and how often a sample that came out too long is drawn again.
EXAMPLE_TOKENS, TRIES = 500, 100
_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_ASKS = "Question: Find all variables that are assigned the value {value} in the text above."
_LEAD = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the"
    " value {value}, they are: "
)


class VariableTracking(Maker):
    """Before each sample stands an example with its answer: always the same, but for the names in it."""

    tokens = 30
    letters = 5

    def __init__(self, length: int, count: Count, seed: int = SEED) -> None:
        super().__init__(length, count, seed)
        self.values = np.random.RandomState(seed)

    def samples(self) -> Iterator[Sample]:
        example = self._example()
        self.tokens += self.count(example)  # RULER counts it once, before its names change
        for sample in self.fitting():
            yield sample._replace(document=f" {self._renamed(example)}\n\n{sample.document}")

    def fitting(self) -> Iterator[Sample]:
        """Samples without an example. RULER doesn't shorten one that is too long: it draws another."""
        units = self._fitting()
        while True:
            drawn = (self.draw(units) for _ in range(TRIES if units > 0 else 0))
            sample = next((s for s in drawn if self.count(s.prompt) + self.tokens <= self.length), None)
            if sample is None:
                raise ConfigError(f"{self.length} tokens are too few for RULER's smallest sample and its example")
            yield sample

    def tail(self, sample: Sample) -> str:
        return f" {sample.answers}"

    def draw(self, units: int) -> Sample:
        names = ["".join(self.rng.choices(ascii_uppercase, k=self.letters)) for _ in range(HOPS + 1)]
        value = str(self.values.randint(10000, 99999))
        chain = [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old} " for old, new in pairwise(names))]
        sentences = self._sentences(units)
        for moved, place in enumerate(sorted(self.rng.sample(range(len(sentences)), len(chain)))):
            sentences.insert(place + moved, chain[moved])
        context = " ".join(sentences).replace(". \n", ".\n")
        lead = _LEAD.format(count=len(names), value=value)
        return Sample(_HEAD + context, _ASKS.format(value=value), lead, names)

    def _sentences(self, units: int) -> list[str]:
        """The noise, as often as that; if it comes no more often than the chain is long, its single sentences."""
        if units > HOPS + 1:
            return [f"{NOISE}\n"] * units
        return [f"{part}." if part.strip() else part for part in f"{NOISE}\n".split(".")] * units

    def _example(self) -> str:
        maker = _Example(EXAMPLE_TOKENS, self.count, self.seed)
        maker.rng, maker.values = self.rng, self.values  # the draws go on from there
        sample = next(maker.fitting())
        return f"{sample.prompt} {' '.join(sample.answers)}\n\n"

    def _renamed(self, example: str) -> str:
        for name in example[example.index("they are: ") + 10 :].split():
            example = example.replace(name, "".join(self.rng.choices(ascii_uppercase, k=len(name))))
        return example


class _Example(VariableTracking):
    letters = 3

    @property
    def step(self) -> int:
        return 5
