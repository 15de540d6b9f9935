"""Questions of SQuAD and HotpotQA, whose paragraphs stand among others."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import lru_cache

from segcore.tasks.base import Match
from segcore.tasks.haystack import ruler_data
from services.evaluation.tasks.ruler.base import SEED, Count, Maker, Sample


class Questions(Maker):
    tokens = 32
    match: Match = "any"

    def __init__(self, data: str, length: int, count: Count, seed: int = SEED) -> None:
        super().__init__(length, count, seed)
        self._data, self._next, self._looking = data, 0, True

    @property
    def most(self) -> int | None:
        return len(paragraphs(self._data)[0])

    def tail(self, sample: Sample) -> str:
        return f" {sample.answers}"

    def samples(self) -> Iterator[Sample]:
        for sample in super().samples():
            yield sample
            self._next += 1

    def draw(self, units: int) -> Sample:
        texts, questions = paragraphs(self._data)
        text, answers, own, more = questions[self._next % len(questions)]
        if units >= len(texts):
            chosen = [*texts]
        elif units - len(own) > len(more):
            known = {*own, *more}
            others = [i for i in range(len(texts)) if i not in known]
            extra = self.rng.sample(others, max(0, units - len(own) - len(more)))
            chosen = [texts[i] for i in (*own, *more, *extra)]
        else:
            chosen = [texts[i] for i in (*own, *self.rng.sample(more, units - len(own)))]
        random.Random(self.seed).shuffle(chosen)
        context = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(chosen, 1))
        ask = (
            "Answer the question based on the given documents. Only give me the answer and do not output any other"
            " words."
        )
        head = f"{ask}\n\nThe following are given documents.\n\n{context}\n\n{ask}\n"
        return Sample(head, f"Question: {text}", " Answer:", answers)


# A question: its text, answers, the paragraphs that answer it, and others of the same article.
Asked = tuple[str, list[str], list[int], list[int]]


@lru_cache(maxsize=2)
def paragraphs(data: str) -> tuple[list[str], list[Asked]]:
    raw = json.loads(ruler_data(f"{data}.json").read_text())
    if data == "squad":
        articles = [[p["context"] for p in article["paragraphs"]] for article in raw["data"]]
        texts = sorted({text for article in articles for text in article})
        index = {text: i for i, text in enumerate(texts)}
        questions = [
            (qa["question"], [a["text"] for a in qa["answers"]], [own], [index[t] for t in texts_of if index[t] != own])
            for article, texts_of in zip(raw["data"], articles, strict=True)
            for p in article["paragraphs"]
            for own in [index[p["context"]]]
            for qa in p["qas"]
            if not qa["is_impossible"]
        ]
        return texts, questions
    texts = sorted({f"{title}\n{''.join(said)}" for question in raw for title, said in question["context"]})
    index = {text: i for i, text in enumerate(texts)}
    return texts, [
        (q["question"], [q["answer"]], [index[f"{title}\n{''.join(said)}"] for title, said in q["context"]], [])
        for q in raw
    ]
