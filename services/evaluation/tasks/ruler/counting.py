"""What occurs most often: words of a list, and coded words whose counts fall as 1/rank²."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator

from services.evaluation.tasks.ruler.base import Maker, Sample
from services.evaluation.tasks.ruler.words import all_words

ZETA_2 = 1.6449340668482264


class CommonWords(Maker):
    tokens = 120

    @property
    def most(self) -> int | None:
        return len(all_words(self.seed))

    def tail(self, sample: Sample) -> str:
        return " " + _numbered(sample.answers)

    def draw(self, units: int) -> Sample:
        if self.length < 4096:
            (shown, shown_answers), (listed, answers) = self._list(20, 3, 1), self._list(units, 6, 1)
        else:
            (shown, shown_answers), (listed, answers) = self._list(40, 10, 3), self._list(units, 30, 3)
        head = (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones"
            " that appear most often.\n"
        )
        question = "Question: What are the 10 most common words in the above list?"
        lead = " Answer: The top 10 words that appear most often in the list are:"
        example = f"{head}{shown}\n{question}{lead}{_numbered(shown_answers)}\n"
        return Sample(f"{example}{head}{listed}", question, lead, answers)

    def _list(self, words: int, often: int, seldom: int) -> tuple[str, list[str]]:
        drawn = self.rng.sample(all_words(self.seed), words)
        listed = drawn[:10] * often + drawn[10:] * seldom
        random.Random(self.seed).shuffle(listed)
        return _numbered(listed), drawn[:10]


class FrequentWords(Maker):
    """Coded words whose counts fall as 1/rank²; RULER looks for their number in its own way."""

    tokens = 50

    def samples(self) -> Iterator[Sample]:
        step = self.length // 32
        units = self.length // 6
        vocabulary = self._vocabulary()
        while self.count(self._of(vocabulary, units).prompt) < self.length:
            units += step
        units -= step
        while True:
            vocabulary, used = self._vocabulary(), units
            while self.count((sample := self._of(vocabulary, used)).prompt) > self.length:
                used -= step
            yield sample

    def draw(self, units: int) -> Sample:
        return self._of(self._vocabulary(), units)

    def _vocabulary(self) -> list[str]:
        size = self.length // 50
        words = [self._coded() for _ in range(size)]
        while len(set(words)) < size:
            words.append(self._coded())
        words = sorted(set(words))
        random.Random(self.seed).shuffle(words)
        return ["...", *words[1:]]

    def _coded(self) -> str:
        return "".join(self.rng.choices(string.ascii_lowercase, k=6))

    def _of(self, vocabulary: list[str], units: int) -> Sample:
        counts = [int(units * rank**-2.0 / ZETA_2) for rank in range(1, len(vocabulary) + 1)]
        words = [word for word, n in zip(vocabulary, counts, strict=True) for _ in range(n)]
        random.Random(self.seed).shuffle(words)
        head = (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently"
            " appeared coded words. "
        )
        question = (
            "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most"
            " frequently appeared words in the above coded text?"
        )
        lead = " Answer: According to the coded text above, the three most frequently appeared words are:"
        return Sample(head + " ".join(words), question, lead, vocabulary[1:4])


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
