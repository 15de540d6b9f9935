"""Records of files: text, JSON lines, Parquet, and data sets that Hugging Face's `datasets` saved to disk.

A file is read once to count its records and hash its bytes, then again for each record that is asked for.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from segcore.errors import ConfigError

# What a record is: fields by name.
Record = dict[str, Any]
TEXTS = (".txt", ".md", ".rst")
LINES = (".jsonl", ".ndjson")


class Fault(Exception):
    """A record that can't be read, and why; the others can."""


class Records(ABC):
    """The records of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def places(self) -> Iterator[tuple[int, int]]:
        """A number that finds each record again, and one that tells people where it is, such as a line's."""

    @abstractmethod
    def read(self, place: int) -> Record:
        """Raises Fault."""

    def digest(self) -> bytes:
        """A hash of the file."""
        with open(self.path, "rb") as file:
            made = blake2b(digest_size=16)
            while data := file.read(2**20):
                made.update(data)
        return made.digest()


class Text(Records):
    """The whole file is a record, with the field "text"."""

    def places(self) -> Iterator[tuple[int, int]]:
        yield 0, 1

    def read(self, place: int) -> Record:
        try:
            return {"text": self.path.read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise Fault(f"byte {error.start} isn't valid UTF-8") from None


class JsonLines(Records):
    """A record on each line; empty lines are none."""

    def places(self) -> Iterator[tuple[int, int]]:
        with open(self.path, "rb") as file:
            at = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield at, number
                at += len(line)

    def read(self, place: int) -> Record:
        with open(self.path, "rb") as file:
            file.seek(place)
            line = file.readline()
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Fault(f"not JSON: {error}") from None
        if not isinstance(record, dict):
            raise Fault(f"a JSON {type(record).__name__}, not an object")
        return record


class Parquet(Records):
    """A record in each row; a group of rows is in memory at a time."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{path} isn't a readable Parquet file: {error}") from error
        groups = range(self._file.metadata.num_row_groups)
        self._starts = [0]
        for group in groups:
            self._starts.append(self._starts[-1] + self._file.metadata.row_group(group).num_rows)
        self._rows = lru_cache(maxsize=2)(self._group)

    def places(self) -> Iterator[tuple[int, int]]:
        return ((row, row) for row in range(self._starts[-1]))

    def read(self, place: int) -> Record:
        import pyarrow as pa

        group = next(i for i, stop in enumerate(self._starts[1:]) if place < stop)
        try:
            rows: list[Record] = self._rows(group).slice(place - self._starts[group], 1).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise Fault(f"row group {group} is damaged: {error}") from None
        return rows[0]

    def _group(self, group: int) -> Any:
        return self._file.read_row_group(group)


class Arrow(Records):
    """A record in each row of an Arrow stream, as `datasets` writes them; the file is mapped, not read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import pyarrow as pa

        try:
            self._table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{path} isn't a readable Arrow stream: {error}") from error

    def places(self) -> Iterator[tuple[int, int]]:
        return ((row, row) for row in range(self._table.num_rows))

    def read(self, place: int) -> Record:
        rows: list[Record] = self._table.slice(place, 1).to_pylist()
        return rows[0]


def open_records(path: Path) -> list[Records]:
    """The files of a path: one, a data set's, or all of a folder in the order of their names. Raises ConfigError."""
    if path.is_file():
        return [_of_file(path)]
    if not path.is_dir():
        raise ConfigError(f"there is no {path}")
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(split.name for split in path.iterdir() if split.is_dir()))
        raise ConfigError(f"{path} holds several splits, each in a folder; name one of them: {splits}")
    if (path / "state.json").exists():
        return _saved(path)
    known = (*TEXTS, *LINES, ".parquet")
    files = sorted(file for file in path.rglob("*") if file.suffix in known and file.is_file())
    if not files:
        raise ConfigError(f"{path} holds none of {', '.join(known)}")
    return [_of_file(file) for file in files]


def _saved(folder: Path) -> list[Records]:
    """What `datasets` calls save_to_disk."""
    try:
        state = json.loads((folder / "state.json").read_text())
        names = [str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} isn't a data set that `datasets` saved: {error!r}") from error
    if state.get("_indices_files"):
        raise ConfigError(f"{folder} is a selection of another data set: save it after flatten_indices()")
    return [Arrow(folder / name) for name in names]


def _of_file(path: Path) -> Records:
    if path.suffix in TEXTS:
        return Text(path)
    if path.suffix in LINES:
        return JsonLines(path)
    if path.suffix == ".parquet":
        return Parquet(path)
    raise ConfigError(f"{path}: its ending isn't one of {', '.join((*TEXTS, *LINES, '.parquet'))}")
