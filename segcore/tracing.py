"""Spans of OpenTelemetry, where it is installed and the caller is being traced; else nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

try:
    from opentelemetry import trace
except ImportError:  # pragma: no cover
    trace = None  # type: ignore[assignment]


@contextmanager
def span(name: str, **attributes: str | int) -> Iterator[None]:
    """A span around what is done for a caller; none of its own where nobody traces."""
    if trace is None or not trace.get_current_span().is_recording():
        yield
        return
    with trace.get_tracer("segcore").start_as_current_span(name, attributes=attributes):
        yield
