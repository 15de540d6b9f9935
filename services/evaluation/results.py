"""Results as they come: one JSON line each, appended by one process; what is there is never asked again."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from segcore.errors import ConfigError, FailedPrecondition

Result = dict[str, Any]
# A result's arm and case.
Key = tuple[str, str]


def key_of(result: Result) -> Key:
    return result["arm"], result["case"]


def read_results(path: Path) -> dict[Key, Result]:
    """A run's results so far, which may still come. Raises ConfigError for a file that was damaged."""
    return _read(path)[0]


class ResultFile:
    """The results of a run, to be added to by one process at a time. Those that are there are read first; a line that
    a crash cut off is taken away.

    Raises FailedPrecondition while another process adds to them, ConfigError for a file that was damaged elsewhere.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115 - closed by `close`
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.results, whole = _read(path)
            self._file.truncate(whole)
        except BlockingIOError as error:
            self.close()
            raise FailedPrecondition(f"another process is at work on {path.parent}: wait for it, or stop it") from error
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def add(self, result: Result) -> None:
        """Keep a result; on disk when this returns. Programmers must not add one twice."""
        assert key_of(result) not in self.results
        self._file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.results[key_of(result)] = result

    def left(self, keys: Iterable[Key]) -> list[Key]:
        """Those without a result, in their order."""
        return [key for key in keys if key not in self.results]


def _read(path: Path) -> tuple[dict[Key, Result], int]:
    """The results, and the bytes of their lines; what follows them isn't a whole line."""
    results: dict[Key, Result] = {}
    whole = 0
    if path.exists():
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                key, result = _checked(path, number, line)
                if key in results:
                    raise ConfigError(f"{path}:{number}: {key} is there twice; take one of them away")
                results[key] = result
                whole += len(line)
    return results, whole


def _checked(path: Path, number: int, line: bytes) -> tuple[Key, Result]:
    try:
        result = json.loads(line)
        return key_of(result), result
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}:{number} isn't a result: {error!r}; take the line away") from error
