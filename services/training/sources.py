"""Sources of streams: files of records, and tasks."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from segcore.errors import ConfigError
from segcore.tasks.base import Item, Room
from segcore.tasks.haystack import Haystack
from segcore.tasks.registry import draw_task
from segcore.training.stream import TrainingStream
from segcore.turns import frame_tokens
from services.training.data_config import SourceConfig, TaskConfig
from services.training.records import Fault, Record, open_records
from services.training.samples import (
    Chat,
    Document,
    StreamMaker,
    chat_of_fields,
    chat_of_messages,
    document_text,
    documents,
)

# Faults that a report tells in full, of each source.
TOLD = 10
# So often an item is drawn until it fits.
ATTEMPTS = 8


@dataclass
class SourceReport:
    """What was found in a source. faults: of records that were left out, by kind; told: some of them in full."""

    documents: int = 0
    streams: int = 0
    chars: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)

    def leave_out(self, kind: str, what: str) -> None:
        self.faults[kind] += 1
        if len(self.told) < TOLD:
            self.told.append(what)


class Source(ABC):
    """Streams by number; the same number is always the same stream."""

    report: SourceReport

    @abstractmethod
    def size(self, number: int) -> int:
        """About how many characters a stream has."""

    @abstractmethod
    def make(self, number: int) -> TrainingStream:
        """The stream. Raises ConfigError if its file has changed under it."""

    @abstractmethod
    def digest(self) -> bytes:
        """A hash of what all streams are made from, beside the configuration."""


class FileSource(Source):
    """Records of files. Every record is looked at when it is opened, so that what is left out is known."""

    def __init__(self, config: SourceConfig, maker: StreamMaker, shuffle: bool, seed: str) -> None:
        self._config, self._maker, self._seed, self._shuffle = config, maker, seed, shuffle
        self.report = SourceReport()
        self._files = [file for path in config.files for file in open_records(path)]
        units = [unit for i in range(len(self._files)) for unit in self._units(i)]
        if not units:
            told = "; ".join(self.report.told)
            raise ConfigError(f"{', '.join(map(str, config.files))}: nothing to train on. {told}")
        # Of each stream: its file, its record, which piece of it, and its characters.
        self._table = np.array(units, dtype=np.int64)
        self.report.streams, self.report.chars = len(units), int(self._table[:, 3].sum())
        self._order = lru_cache(maxsize=2)(self._permutation)

    def size(self, number: int) -> int:
        return int(self._table[self._at(number), 3])

    def make(self, number: int) -> TrainingStream:
        file, place, piece, _ = map(int, self._table[self._at(number)])
        records = self._files[file]
        name = f"{records.path}:{place}" + (f" piece {piece}" if piece else "")
        try:
            sample = self._samples(records.read(place))[piece]
        except (Fault, IndexError, OSError) as error:
            raise ConfigError(f"{name}: the file has changed since it was opened: {error}") from error
        if isinstance(sample, Document):
            return self._maker.document(name, sample)
        return self._maker.conversation(name, sample, self._config.loss != "all")

    def digest(self) -> bytes:
        return b"".join(file.digest() for file in self._files)

    def _at(self, number: int) -> int:
        epoch, at = divmod(number, len(self._table))
        return int(self._order(epoch)[at]) if self._shuffle else at

    def _permutation(self, epoch: int) -> np.ndarray:
        return _generator(f"{self._seed} {epoch}").permutation(len(self._table))

    def _units(self, file: int) -> Iterator[tuple[int, int, int, int]]:
        """The streams of a file; what can't be one is counted."""
        records = self._files[file]
        for place, where in records.places():
            self.report.documents += 1
            try:
                samples = self._samples(records.read(place))
            except Fault as fault:
                kind = "empty" if "empty" in str(fault) else "too long" if "longer" in str(fault) else "corrupt"
                self.report.leave_out(kind, f"{records.path}:{where}: {fault}")
                continue
            for piece, sample in enumerate(samples):
                yield file, place, piece, sample.chars if isinstance(sample, Chat) else len(sample.text)

    def _samples(self, record: Record) -> Sequence[Document | Chat]:
        """Raises Fault."""
        config = self._config
        if not config.messages and not config.prompt:
            return documents(document_text(record, config.text or "text"), config.most_chars)
        if config.messages:
            chat = chat_of_messages(record.get(config.messages))
        else:
            chat = chat_of_fields(record, config.prompt, config.answer or "")
        if config.most_chars is not None and chat.chars > config.most_chars:
            raise Fault(f"a conversation of {chat.chars} characters is longer than {config.most_chars}")
        return [chat]


class TaskSource(Source):
    """Items of tasks, made when they are asked for; there is no end of them.

    An item that doesn't fit its length is drawn anew, under the same task; a task of which none fits the shortest is
    refused at once.
    """

    def __init__(self, config: SourceConfig, maker: StreamMaker, seed: str) -> None:
        self._config, self._maker, self._seed = config, maker, seed
        self._haystack = Haystack.named(config.haystack).part(config.split)
        self._count = lru_cache(maxsize=2**17)(lambda text: len(maker.text.encode_continuation(text)))
        self._weights = [task.weight for task in config.tasks]
        self.report = SourceReport()
        for task in config.tasks:
            self._fitting(task, min(config.lengths), "first", random.Random(seed))

    def size(self, number: int) -> int:
        return 4 * self._length(number)

    def make(self, number: int) -> TrainingStream:
        rng = random.Random(f"{self._seed} task {number}")
        chosen = rng.choices(self._config.tasks, self._weights)[0]
        item = self._fitting(chosen, self._length(number), str(number), rng)
        return self._maker.item(item.name, item, self._config.loss or "answers")

    def _fitting(self, task: TaskConfig, length: int, name: str, rng: random.Random) -> Item:
        frame, turn = frame_tokens(self._maker.text, self._maker.chat)
        room = Room(
            split=self._config.split,
            length=length,
            haystack=self._haystack,
            count=self._count,
            frame_tokens=frame,
            turn_tokens=turn,
        )
        for attempt in range(ATTEMPTS):
            seed = f"{self._seed} {name}" + (f" again {attempt}" if attempt else "")
            try:
                return draw_task(task.task, task.options, rng).make(room, seed)
            except ConfigError as error:
                fault = error
        raise fault

    def digest(self) -> bytes:
        return self._haystack.digest.encode()

    def _length(self, number: int) -> int:
        return random.Random(f"{self._seed} length {number}").choice(self._config.lengths)


def open_source(config: SourceConfig, maker: StreamMaker, *, shuffle: bool, seed: str) -> Source:
    """Open a source; every file of it is read once. Raises ConfigError."""
    return FileSource(config, maker, shuffle, seed) if config.files else TaskSource(config, maker, seed)


def _generator(seed: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(blake2b(seed.encode(), digest_size=8).digest()))
