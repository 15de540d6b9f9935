"""docker-compose.yml at work: `make cluster-up-test` starts it; engines are killed and cut off while they answer."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import requests

from tests.cluster.conftest import ROOT

pytestmark = [
    pytest.mark.skipif("CLUSTER_UP" not in os.environ, reason="make cluster-up-test runs it"),
    pytest.mark.timeout(900),
]

SECRETS = ROOT / ".secrets"
TEXT = "".join(f"Line {i} of this text says {i * i}.\n" for i in range(200)).encode()[:6000]
SESSIONS = [f"up-{i}-{time.time_ns()}" for i in range(6)]
TOKENS = 100
WAIT_S = 300


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with requests.Session() as http:
        http.trust_env = False
        http.verify = str(SECRETS / "tls.crt")
        http.headers["Authorization"] = f"Bearer {(SECRETS / 'token').read_text()}"
        yield Service(http)


class Service:
    def __init__(self, http: requests.Session, url: str = "https://localhost:8100") -> None:
        self._http, self._url = http, url

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        answer = self._http.request(method, f"{self._url}{path}", timeout=300, **options)
        answer.raise_for_status()
        return answer

    def upload(self, session: str) -> None:
        self.call("POST", "/v1/sessions", json={"session_id": session})
        where, offset = f"/v1/sessions/{session}/documents/text", 0
        while offset < len(TEXT):
            sent = self.call("PUT", where, params={"offset": offset}, data=TEXT[offset : offset + 4096])
            offset = sent.json()["committed_offset"]
        digest = hashlib.sha256(TEXT).hexdigest()
        self.call("POST", f"{where}/finish", json={"total_bytes": len(TEXT), "sha256": digest})

    def ask(self, session: str, tokens: int, begun: threading.Event | None = None) -> str:
        """An answer's text. Raises RuntimeError if it breaks off."""
        question = {"role": "user", "content": "What is this text about?"}
        (model,) = self.call("GET", "/v1/models").json()["data"]
        wanted = {"model": model["id"], "session_id": session, "max_tokens": tokens}
        wanted |= {"stream": True, "temperature": 0}
        text = ""
        with self.call("POST", "/v1/chat/completions", json=wanted | {"messages": [question]}, stream=True) as lines:
            for line in lines.iter_lines():
                if not line.startswith(b"data: {"):
                    continue
                part = json.loads(line[6:])
                if "error" in part:
                    raise RuntimeError(part["error"])
                text += "".join(choice["delta"].get("content") or "" for choice in part["choices"])
                if begun is not None and text:
                    begun.set()
        return text


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def compose(*words: str) -> str:
    return docker("compose", "--profile", "cpu", *words)


def eventually(service: Service, session: str, tokens: int) -> str:
    until = time.monotonic() + WAIT_S
    while True:
        try:
            return service.ask(session, tokens)
        except (RuntimeError, requests.RequestException):
            if time.monotonic() > until:
                raise
            time.sleep(1)


def test_strangers_are_turned_away():
    answer = requests.get("https://localhost:8100/v1/models", verify=str(SECRETS / "tls.crt"), timeout=30)
    assert answer.status_code == 401


@pytest.fixture(scope="module")
def expected(service) -> str:
    """What a session answers that nobody disturbs."""
    session = f"{SESSIONS[0]}-alone"
    service.upload(session)
    return service.ask(session, TOKENS)


@contextmanager
def everybody_asking(service: Service, sessions: list[str]) -> Iterator[list[Future[str]]]:
    """Documents streamed in, and an answer to each under way."""
    for session in sessions:
        service.upload(session)
    begun = [threading.Event() for _ in sessions]
    with ThreadPoolExecutor(len(sessions)) as threads:
        asked = [threads.submit(service.ask, s, TOKENS, b) for s, b in zip(sessions, begun, strict=True)]
        assert all(event.wait(WAIT_S) for event in begun)
        yield asked


def test_sessions_outlive_the_engine_that_they_were_on(service, expected):
    with everybody_asking(service, SESSIONS) as asked:
        compose("kill", "engine-1")
        try:
            assert {future.result(WAIT_S) for future in asked} == {expected}  # no token repeated, none missing
        finally:
            compose("start", "engine-1")
    for session in SESSIONS:
        assert service.call("GET", f"/v1/sessions/{session}").json()["documents"][0]["finished"]


def test_an_engine_that_was_cut_off_finds_that_the_other_has_gone_on(service, expected):
    """Its network is gone, not its process: it believes in its leases until it returns."""
    wait_for_engines(2)
    sessions = [f"{session}-cut" for session in SESSIONS]
    (network,) = docker("network", "ls", "-q", "--filter", "label=com.docker.compose.project=segcore").split()
    container = compose("ps", "-q", "engine-2").strip()
    with everybody_asking(service, sessions) as asked:
        docker("network", "disconnect", network, container)
        try:
            assert {future.result(WAIT_S) for future in asked} == {expected}
            before = [service.call("GET", f"/v1/sessions/{session}").json() for session in sessions]
        finally:
            docker("network", "connect", "--alias", "engine-2", network, container)
    wait_for_engines(2)
    for session, told in zip(sessions, before, strict=True):
        assert service.call("GET", f"/v1/sessions/{session}").json()["generation"] == told["generation"]
    assert len({eventually(service, session, 8) for session in sessions}) == 1


def wait_for_engines(engines: int) -> None:
    """So many nodes for engines, as Ray has it."""
    until = time.monotonic() + WAIT_S
    while True:
        nodes = compose("exec", "-T", "head", "ray", "list", "nodes", "--format=json", "--filter", "state=ALIVE")
        there = [node for node in json.loads(nodes[nodes.index("[") :]) if "engine" in node["resources_total"]]
        if len(there) >= engines:
            return
        assert time.monotonic() < until, nodes
        time.sleep(2)


def test_a_head_that_restarts_is_not_noticed(service):
    compose("kill", "head")
    try:
        assert service.ask(SESSIONS[0], 8)
    finally:
        compose("start", "head")
    assert eventually(service, SESSIONS[1], 8)


def test_every_node_is_measured():
    until = time.monotonic() + WAIT_S
    while True:
        found = requests.get("http://localhost:9090/api/v1/targets", timeout=30).json()["data"]["activeTargets"]
        nodes = [target for target in found if ":8080/" in target["scrapeUrl"]]  # beside them, the head's own services
        if len(nodes) >= 3 and all(target["health"] == "up" for target in nodes):
            return
        assert time.monotonic() < until, found
        time.sleep(2)


def test_the_dashboard_asks_for_what_there_is():
    """Each of its figures is an answer of Prometheus, and most aren't empty."""
    dashboard = json.loads((ROOT / "cluster" / "monitoring" / "grafana-dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    filled = 0
    for query in asked:
        wanted = {"query": query.replace("$__rate_interval", "5m")}
        answer = requests.get("http://localhost:9090/api/v1/query", params=wanted, timeout=30).json()
        assert answer["status"] == "success", query
        filled += bool(answer["data"]["result"])
    assert filled > len(asked) / 2
