"""What is measured of a service while it runs: names for Prometheus, by way of Ray's own exporters.

A metric NAME appears as ray_NAME, a counter as ray_NAME_total, on the metrics port of each node of Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ray.util import metrics as ray_metrics

Kind = Literal["counter", "gauge", "histogram"]

_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]


class Metric(NamedTuple):
    kind: Kind
    description: str
    tags: tuple[str, ...] = ()


METRICS: dict[str, Metric] = {
    "segcore_requests": Metric("counter", "Calls that ended, by their status", ("face", "method", "code")),
    "segcore_request_seconds": Metric("histogram", "Seconds of a call, its stream included", ("face", "method")),
    "segcore_uploaded_bytes": Metric("counter", "Bytes of documents that were taken"),
    "segcore_last_byte_seconds": Metric("histogram", "Seconds from a document's last byte until all of it was run"),
    "segcore_first_token_seconds": Metric("histogram", "Seconds from a question to its answer's first text (TTFT)"),
    "segcore_token_seconds": Metric("histogram", "Seconds for each further token of an answer (TPOT)"),
    "segcore_answer_tokens": Metric("counter", "Tokens of answers"),
    "segcore_run_tokens": Metric("counter", "Tokens that were run, by the kind of pass", ("kind",)),
    "segcore_sessions": Metric("gauge", "Streams in the engine"),
    "segcore_slots_used": Metric("gauge", "States on the device"),
    "segcore_queued_sessions": Metric("gauge", "Streams that have work and no slot"),
    "segcore_queued_tokens": Metric("gauge", "Tokens that wait to be run"),
    "segcore_engine_bytes": Metric("gauge", "Memory of the engine apart from past KV"),
    "segcore_past_bytes": Metric("gauge", "Past KV", ("tier",)),
    "segcore_segments": Metric("counter", "Segments that were run, or taken over from past KV", ("outcome",)),
    "segcore_restored_segments": Metric("counter", "Segments of sessions taken up again, by outcome", ("outcome",)),
    "segcore_index_tokens": Metric("counter", "Tokens that the oracle chose in some searches; those found", ("kind",)),
    "segcore_recoveries": Metric("counter", "Times that past KV was lost or damaged, and made again"),
    "segcore_tier_faults": Metric("counter", "What went wrong in tiers; BlockMismatch is a fingerprint", ("fault",)),
    "segcore_fingerprint_refusals": Metric("counter", "Sessions of another model or configuration that were refused"),
}


def exported(name: str) -> str:
    """A metric's name in Prometheus."""
    return f"ray_{name}_total" if METRICS[name].kind == "counter" else f"ray_{name}"


class Meter:
    """This process's metrics. All names are of METRICS."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._seen: dict[tuple[str, str], float] = {}

    def count(self, name: str, amount: float = 1, **tags: str) -> None:
        if amount > 0:
            self._metric(name).inc(amount, tags=tags)

    def observe(self, name: str, value: float, **tags: str) -> None:
        self._metric(name).observe(value, tags=tags)

    def gauge(self, name: str, value: float, **tags: str) -> None:
        self._metric(name).set(value, tags=tags)

    def totals(self, name: str, totals: Mapping[str, float], tag: str = "") -> None:
        """Bring a counter to what somebody else has counted, by the values of a tag."""
        for key, total in totals.items():
            self.count(name, total - self._seen.get((name, key), 0), **({tag: key} if tag else {}))
            self._seen[name, key] = total

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            kind, description, tags = METRICS[name]
            if kind == "histogram":
                made = ray_metrics.Histogram(name, description, boundaries=_SECONDS, tag_keys=tags)
            else:
                made = {"counter": ray_metrics.Counter, "gauge": ray_metrics.Gauge}[kind](name, description, tags)
            self._made[name] = made
        return self._made[name]


METER = Meter()
