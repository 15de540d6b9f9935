"""Files of JSON lines, or of one JSON array: their rows, checked; what is wrong is told with its line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from segcore.errors import ConfigError
from services.config_file import describe


class Row(BaseModel):
    """One row of a file; fields that aren't named here may be there too."""

    model_config = ConfigDict(extra="ignore", frozen=True)


R = TypeVar("R", bound=Row)


def read_rows(path: Path, row: type[R]) -> tuple[list[R], str]:
    """All rows of a file, and a hash of it. Raises ConfigError with FILE:LINE."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} isn't a readable UTF-8 file: {error}") from error
    found = []
    try:
        for line, value in _array(text) if text.lstrip().startswith("[") else _lines(text):
            found.append(_checked(path, line, value, row))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg}") from error
    if not found:
        raise ConfigError(f"{path} has no rows")
    return found, hashlib.blake2b(data, digest_size=8).hexdigest()


def _checked(path: Path, line: int, value: Any, row: type[R]) -> R:
    try:
        return row.model_validate(value)
    except ValidationError as error:
        faults = "; ".join(describe(fault) for fault in error.errors())
        raise ConfigError(f"{path}:{line}: {faults}") from error


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                error.lineno = number
                raise


def _array(text: str) -> Iterator[tuple[int, Any]]:
    """Element by element, for their lines."""
    decoder, gap = json.JSONDecoder(), re.compile(r"\s*")
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = gap.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("]", at):
            return
        line, counted = line + text.count("\n", counted, at), at
        value, end = decoder.raw_decode(text, at)
        yield line, value
        at = gap.match(text, end).end()  # type: ignore[union-attr]
        if text.startswith(",", at):
            at += 1
        elif not text.startswith("]", at):
            raise json.JSONDecodeError("the array doesn't end", text, at)
