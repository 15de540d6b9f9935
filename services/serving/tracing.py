"""Spans of OpenTelemetry, where it is installed and a tracer is set up; else nothing.

Serve sets one up in each replica, and carries contexts from replica to replica, if the configuration's `tracing` says
who makes span processors. `otlp` does, for a collector that the usual OTEL_EXPORTER_OTLP_* variables name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

try:
    from opentelemetry import trace
    from opentelemetry.propagate import extract
except ImportError:  # pragma: no cover
    trace = None  # type: ignore[assignment]


def otlp(_file_name: str) -> list[Any]:
    """Span processors that send to an OpenTelemetry collector over gRPC; needs opentelemetry-exporter-otlp."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # type: ignore[import-not-found,unused-ignore]
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]


@contextmanager
def stream_span(name: str) -> Iterator[Any]:
    """A span around a stream, which may be closed elsewhere than where it was read: nothing becomes its child."""
    if trace is None:
        yield None
        return
    made = trace.get_tracer("segcore").start_span(name)
    try:
        yield made
    finally:
        made.end()


@contextmanager
def span(name: str, carrier: Mapping[str, str] | None = None, **attributes: str | int) -> Iterator[Any]:
    """A span around what is done; carrier: headers of a caller whose trace it belongs to."""
    if trace is None:
        yield None
        return
    context = extract(carrier) if carrier else None
    with trace.get_tracer("segcore").start_as_current_span(name, context, attributes=attributes) as made:
        yield made
