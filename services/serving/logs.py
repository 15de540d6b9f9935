"""Logs as JSON lines, each with what is known of the call it was written for. Texts of users are in none of them."""

from __future__ import annotations

import datetime
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

_FIELDS: ContextVar[dict[str, object] | None] = ContextVar("segcore_log_fields", default=None)
_OURS = ("segcore", "services")


@contextmanager
def log_fields(**fields: object) -> Iterator[None]:
    """Add fields to all that is logged inside."""
    token = _FIELDS.set({**(_FIELDS.get() or {}), **fields})
    try:
        yield
    finally:
        with suppress(ValueError):  # a stream that is closed elsewhere than where it was read
            _FIELDS.reset(token)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the call's fields, and a failure's traceback."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": time,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _FIELDS.get() or {}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def log_as_told() -> None:
    """If SEGCORE_LOG is "json", write our own loggers' lines so to standard error, which Ray keeps for each replica."""
    if os.environ.get("SEGCORE_LOG") != "json":
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
