"""The chart without the operator, on a real node: `make cluster-node-test`. An engine's pod is deleted amid answers."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml

from tests.cluster.api_server import ASSETS, ApiServer, open_api_server
from tests.cluster.node import open_node
from tests.cluster.test_compose_up import TOKENS, WAIT_S, Service, everybody_asking

pytest.importorskip("kubernetes_validate", reason="scripts/cluster-tools installs it")
from tests.cluster.test_kuberay import pods

pytestmark = [
    pytest.mark.skipif("CLUSTER_NODE" not in os.environ, reason="make cluster-node-test runs it"),
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings("ignore:Unverified HTTPS request"),
]

NAMESPACE = "default"
SESSIONS = [f"node-{i}-{time.time_ns()}" for i in range(4)]
# Requests that fit a small machine; what pods use isn't bounded by them.
VALUES = {
    "operator": False,
    "secrets": {"ray": "ray"},
    "head": {"resources": {"cpu": "200m", "memory": "3Gi"}},
    "front": {"resources": {"cpu": "200m", "memory": "2Gi"}},
    "engine": {"maxReplicas": 2, "resources": {"cpu": "400m", "memory": "4Gi"}},
    "redis": {"resources": {"cpu": "100m", "memory": "256Mi"}},
    "serve": {"autoscaling": {"max_replicas": 2}, "threads": 1, "lease_s": 2},
}


@pytest.fixture(scope="module")
def node(render) -> Iterator[ApiServer]:
    """With all that the chart makes, and what it asks of a cluster: secrets and volumes."""
    folder, assets = Path(tempfile.mkdtemp(prefix="node-", dir="/tmp")), Path(os.environ[ASSETS])
    (folder / "values.yaml").write_text(yaml.safe_dump(VALUES))
    objects = render("-f", str(folder / "values.yaml"))
    images = sorted({container["image"] for pod in pods(objects) for container in pod["containers"]})
    with open_api_server(assets, folder) as server, open_node(server, assets, folder, images):
        for name, key in (("segcore-redis", "password"), ("ray", "auth_token")):
            server.kubectl("create", "secret", "generic", name, f"--from-literal={key}={'0123456789abcdef' * 4}")
        server.create([volume(folder / f"volume-{i}") for i in range(3)], NAMESPACE)
        server.create(objects, NAMESPACE)
        yield server
    shutil.rmtree(folder, ignore_errors=True)


def volume(folder: Path) -> dict:
    folder.mkdir()
    folder.chmod(0o777)
    spec = {"capacity": {"storage": "20Gi"}, "accessModes": ["ReadWriteOnce"], "hostPath": {"path": str(folder)}}
    return {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": folder.name}, "spec": spec}


def pods_of(server: ApiServer, component: str) -> list[dict]:
    selector = f"app.kubernetes.io/component={component}"
    return json.loads(server.kubectl("get", "pods", "-n", NAMESPACE, "-l", selector, "-o", "json"))["items"]


def ready(pod: dict) -> bool:
    return any((each["type"], each["status"]) == ("Ready", "True") for each in pod["status"].get("conditions", ()))


def wait_until_ready(server: ApiServer, component: str, count: int) -> list[dict]:
    until = time.monotonic() + 2 * WAIT_S
    while True:
        found = pods_of(server, component)
        if sum(map(ready, found)) == count == len(found):
            return found
        assert time.monotonic() < until, server.kubectl("describe", "pods", "-n", NAMESPACE)
        time.sleep(1)


@pytest.fixture(scope="module")
def service(node: ApiServer) -> Iterator[Service]:
    (front,) = wait_until_ready(node, "front", 1)
    wait_until_ready(node, "engine", 2)
    with requests.Session() as http:
        http.trust_env = False
        yield Service(http, f"http://{front['status']['podIP']}:8100")


def test_sessions_outlive_the_pod_of_their_engine(node, service):
    service.upload("alone")
    expected = service.ask("alone", TOKENS)
    with everybody_asking(service, SESSIONS) as asked:
        node.kubectl("delete", "pod", "x-engine-0", "-n", NAMESPACE, "--grace-period=0", "--force", "--wait=false")
        assert {future.result(WAIT_S) for future in asked} == {expected}
    wait_until_ready(node, "engine", 2)
    for session in SESSIONS:
        assert service.call("GET", f"/v1/sessions/{session}").json()["documents"][0]["finished"]
