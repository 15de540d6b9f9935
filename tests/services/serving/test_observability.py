"""What an operator sees: metrics, logs, traces, and a dashboard of metrics that exist."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from protos.gen.segcore.v1 import segcore_pb2 as pb
from protos.gen.segcore.v1 import segcore_pb2_grpc as stubs
from segcore.errors import SegcoreError
from segcore.sampling import SamplingParams
from services.serving import metrics
from services.serving.client import Client
from services.serving.logs import JsonFormatter, log_fields
from services.serving.metrics import METRICS, Meter, exported
from tests.services.serving.conftest import DOCUMENT

ROOT = Path(__file__).parent.parent.parent.parent
DASHBOARD = ROOT / "cluster" / "monitoring" / "grafana-dashboard.json"
SECRET = "Nobody-may-read-this"


@pytest.fixture
def seen(monkeypatch):
    """All that is measured: name and tags, and the values."""
    found: dict[tuple, list[float]] = {}

    class Recorder:
        def __init__(self, name, description, tags=(), *, boundaries=None, tag_keys=()):
            assert tuple(tags or tag_keys) == METRICS[name].tags
            self._name = name

        def record(self, value=1, tags=None):
            assert set(tags) == set(METRICS[self._name].tags)
            found.setdefault((self._name, *sorted(tags.values())), []).append(value)

        inc = observe = set = record

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics.ray_metrics, kind, Recorder)
    monkeypatch.setattr(metrics.METER, "_made", {})
    monkeypatch.setattr(metrics.METER, "_seen", {})
    return found


@pytest.fixture
def log(monkeypatch):
    """All that is logged, as lines of JSON."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(JsonFormatter())
    for name in ("segcore", "services"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [handler])
        logging.getLogger(name).setLevel(logging.DEBUG)
    yield text
    for name in ("segcore", "services"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def use(served):
    """A session from its beginning to its end."""
    with Client(served.grpc) as client:
        session = client.create_session("seen").session_id
        client.upload(session, f"{SECRET} " * 40)
        list(client.generate(session, f"{SECRET}?", SamplingParams(max_tokens=6)))
        client.delete_session(session)
        with pytest.raises(SegcoreError):
            client.get_session("absent")


def test_what_happens_is_measured(front, engine, seen):
    use(front())
    engine.measure()
    assert seen["segcore_requests", "Generate", "OK", "grpc"] == [1]
    assert seen["segcore_requests", "GetSession", "NOT_FOUND", "grpc"] == [1]
    assert sum(seen["segcore_uploaded_bytes",]) == len(f"{SECRET} " * 40)
    assert len(seen["segcore_first_token_seconds",]) == len(seen["segcore_last_byte_seconds",]) == 1
    assert sum(seen["segcore_answer_tokens",]) >= 1
    assert sum(seen["segcore_run_tokens", "prefill"]) >= 40
    assert sum(seen["segcore_segments", "run"]) >= 10
    assert seen["segcore_past_bytes", "host"][-1] >= 0
    assert seen["segcore_queued_tokens",] == [0]


def test_recall_of_the_index_is_measured(front, engine, seen):
    """A stream that is longer than the index's candidates, so that it can miss some."""
    with Client(front().grpc) as client:
        session = client.create_session().session_id
        client.upload(session, DOCUMENT)
        list(client.generate(session, "When?", SamplingParams(max_tokens=4)))
        client.delete_session(session)
    engine.measure()
    chosen, found = (sum(seen["segcore_index_tokens", kind]) for kind in ("chosen", "found"))
    assert 0 < found <= chosen
    panels = {panel["title"]: panel["targets"][0]["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"]}
    asked = re.findall(r'(\w+)\{kind="(\w+)"\}', panels["Recall of the index"])
    assert asked == [(exported("segcore_index_tokens"), "found"), (exported("segcore_index_tokens"), "chosen")]


def test_totals_become_increments(seen):
    meter = Meter()
    for total in (3, 3, 10):
        meter.totals("segcore_tier_faults", {"disk.BlockDamaged": total}, "fault")
    assert seen["segcore_tier_faults", "disk.BlockDamaged"] == [3, 7]


def test_logs_name_the_call_and_hold_no_text(front, log):
    use(front())
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    calls = [line for line in lines if line["message"] == "call"]
    assert {"CreateSession", "UploadDocument", "Generate", "DeleteSession", "GetSession"} <= {
        c["method"] for c in calls
    }
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", call["request_id"]) for call in calls)
    assert {call["session_id"] for call in calls} == {"seen", "absent"}
    assert SECRET not in log.getvalue()


def test_a_request_id_is_taken_over_if_it_is_one(front, log):
    served = front()
    for given in ("mine-1", "bad id\t"):
        request = urllib.request.Request(f"{served.http}/v1/models", headers={"X-Request-Id": given})
        with urllib.request.urlopen(request, timeout=20):
            pass
    ids = [json.loads(line)["request_id"] for line in log.getvalue().splitlines()]
    assert ids[0] == "mine-1"
    assert re.fullmatch("[0-9a-f]{32}", ids[1])


def test_a_failure_is_logged_with_its_traceback_and_told_without(front, engine, log, monkeypatch):
    async def broken(*_, **__):
        raise RuntimeError("the inside")

    monkeypatch.setattr(engine, "get", broken)
    with Client(front().grpc) as client, pytest.raises(SegcoreError, match="an internal error") as caught:
        client.get_session("x")
    assert "the inside" not in str(caught.value)
    failed = [json.loads(line) for line in log.getvalue().splitlines() if "traceback" in line]
    assert any("the inside" in line["traceback"] and line["session_id"] == "x" for line in failed)


def test_fields_are_of_their_call_alone(log):
    ours = logging.getLogger("services.test")
    with log_fields(request_id="a"):
        ours.info("inside")
    ours.info("outside")
    inside, outside = (json.loads(line) for line in log.getvalue().splitlines())
    assert inside["request_id"] == "a"
    assert "request_id" not in outside


def test_a_trace_goes_from_the_caller_to_the_engine(front, monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    served, caller = front(), "0af7651916cd43dd8448eb211c80319c"
    with Client(served.grpc) as client:
        client.create_session("traced")
        client.upload("traced", "A text.")
    with grpc.insecure_channel(served.grpc) as channel:
        metadata = [("traceparent", f"00-{caller}-b7ad6b7169203331-01"), ("session_id", "traced")]
        request = pb.GenerateRequest(session_id="traced", question="What?")
        request.sampling.max_tokens = 4
        list(stubs.GenerationServiceStub(channel).Generate(request, metadata=metadata, timeout=30))
    spans = {span.name: span for span in exporter.get_finished_spans() if f"{span.context.trace_id:032x}" == caller}
    assert set(spans) == {"grpc Generate", "engine answer"}
    assert spans["engine answer"].parent.span_id == spans["grpc Generate"].context.span_id
    assert spans["engine answer"].attributes["answer_tokens"] >= 1
    assert spans["grpc Generate"].attributes["session_id"] == "traced"


def test_the_dashboard_asks_for_metrics_that_exist():
    asked = set(re.findall(r"\bray_segcore_\w+", DASHBOARD.read_text()))
    histograms = {exported(name) for name, metric in METRICS.items() if metric.kind == "histogram"}
    known = {exported(name) for name in METRICS} - histograms | {f"{name}_bucket" for name in histograms}
    assert asked == known  # and for all of them


def test_the_dashboard_is_what_its_script_writes():
    subprocess.run([sys.executable, ROOT / "scripts" / "dashboard", "--check"], check=True)
