"""Results as they come: one JSON line each, appended by one process; what is there is never asked again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from segcore.errors import ConfigError

Result = dict[str, Any]
# A result's arm and case.
Key = tuple[str, str]


def key_of(result: Result) -> Key:
    return result["arm"], result["case"]


class ResultFile:
    """The results of a run. Those that are there are read first; a line that a crash cut off is taken away.

    Raises ConfigError for a file that was damaged elsewhere.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[Key, Result] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._take_up()

    def add(self, result: Result) -> None:
        """Keep a result; on disk when this returns. Programmers must not add one twice."""
        assert key_of(result) not in self.results
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.results[key_of(result)] = result

    def left(self, keys: Iterable[Key]) -> list[Key]:
        """Those without a result, in their order."""
        return [key for key in keys if key not in self.results]

    def _take_up(self) -> None:
        if not self.path.exists():
            return
        whole = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                self._read(number, line)
                whole += len(line)
        os.truncate(self.path, whole)

    def _read(self, number: int, line: bytes) -> None:
        try:
            result = json.loads(line)
            key = key_of(result)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.path}:{number} isn't a result: {error!r}; take the line away") from error
        if key in self.results:
            raise ConfigError(f"{self.path}:{number}: {key} is there twice; take one of them away")
        self.results[key] = result
