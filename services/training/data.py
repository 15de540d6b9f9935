"""Streams to train on, from files of text or JSON lines. A stand-in until the real loader is merged."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

from segcore.text import TextTokenizer
from segcore.training.stream import TrainingStream


class DataConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    files: list[Path]
    seed: int = 0
    streams_per_step: int = Field(default=8, ge=1)
    max_tokens: int = Field(default=8192, ge=2)


class Loader:
    def __init__(self, config: DataConfig, texts: list[str], tokenizer: TextTokenizer) -> None:
        self._config, self._texts, self._tokenizer, self._step = config, texts, tokenizer, 0

    def batches(self, rank: int, world: int) -> Iterator[list[TrainingStream]]:
        size = self._config.streams_per_step
        while True:
            first = self._step * size
            self._step += 1
            yield [self._stream(i) for i in range(first + rank, first + size, world)]

    def _stream(self, index: int) -> TrainingStream:
        epoch, at = divmod(index, len(self._texts))
        order = random.Random(f"{self._config.seed} {epoch}").sample(range(len(self._texts)), len(self._texts))
        tokens = self._tokenizer.tokenizer.encode(self._texts[order[at]])[: self._config.max_tokens]
        return TrainingStream(f"text {order[at]}", torch.tensor(tokens))

    def state(self) -> dict[str, int]:
        return {"step": self._step}

    def restore(self, state: dict[str, int]) -> None:
        self._step = state["step"]

    def digest(self) -> str:
        return hashlib.blake2b("\0".join(self._texts).encode(), digest_size=20).hexdigest()


def open_data(config: DataConfig, tokenizer: TextTokenizer) -> Loader:
    texts: list[str] = []
    for file in config.files:
        lines = file.read_text().splitlines()
        texts += [json.loads(line)["text"] for line in lines] if file.suffix == ".jsonl" else lines
    return Loader(config, texts, tokenizer)
