"""Every object of the chart, in every form, created on a real API server: `make cluster-apiserver-test`.

It needs $KUBEBUILDER_ASSETS: the folder of kube-apiserver and etcd that `setup-envtest use -p path` names, or that
`scripts/api-server` builds. What the operator would do with them isn't shown.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.api_server import ASSETS, ApiServer, open_api_server
from tests.cluster.test_kuberay import CORE_FAULTS, FORMS, RAY_FAULTS, UNCHECKED, changed, custom, of_kind, templates

__all__ = ["custom"]

pytestmark = [
    pytest.mark.skipif(ASSETS not in os.environ, reason="make cluster-apiserver-test runs it"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:Unverified HTTPS request"),
]


@pytest.fixture(scope="module")
def server(crds: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with open_api_server(Path(os.environ[ASSETS]), tmp_path_factory.mktemp("api-server")) as server:
        server.define(crds)
        yield server


@pytest.fixture
def namespace(server: ApiServer, request: pytest.FixtureRequest) -> str:
    """One of the test's own, whose pods may have no rights, where the server has Pod Security admission."""
    name = f"test-{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    thing = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    server.kubectl("create", "-f", "-", sent=thing)
    return name


def without_others(objects: list[dict]) -> list[dict]:
    return [thing for thing in objects if thing["kind"] not in UNCHECKED]


@pytest.mark.parametrize("form", FORMS)
def test_objects_are_created_and_nothing_of_them_is_dropped(server, namespace, render, form):
    objects = without_others(render(*FORMS[form]))
    assert server.create(objects, namespace).count(" created") == len(objects)
    for thing in objects:
        name = thing["metadata"]["name"]
        stored = json.loads(server.kubectl("get", thing["kind"], name, "-n", namespace, "-o", "json"))
        for part in thing.keys() - {"apiVersion", "metadata"}:
            assert not lacking(thing[part], stored[part], f"{thing['kind']} {name}: {part}")


def lacking(sent: Any, stored: Any, path: str) -> list[str]:
    """Where what is stored isn't what was sent; the server adds defaults, and may drop nothing."""
    if isinstance(sent, dict) and isinstance(stored, dict):
        return [fault for name in sent for fault in lacking(sent[name], stored.get(name), f"{path}.{name}")]
    if isinstance(sent, list) and isinstance(stored, list) and len(sent) == len(stored):
        return [fault for i, each in enumerate(sent) for fault in lacking(each, stored[i], f"{path}.{i}")]
    return [] if stored in (sent, str(sent)) else [path]  # a quantity that is a number is stored as text


@pytest.mark.parametrize("form", FORMS)
def test_pods_are_admitted(server, namespace, render, form):
    """A definition says what fields a pod may have; that it is a pod, the server alone. Those of Redis lack a volume
    that their set would make."""
    things = [thing for thing in render(*FORMS[form]) if "volumeClaimTemplates" not in thing.get("spec", {})]
    pods = [pod_of(template, i) for i, template in enumerate(each for thing in things for each in templates(thing))]
    assert len(pods) >= 2
    assert server.create(pods, namespace, "--dry-run=server").count(" created (server dry run)") == len(pods)


def pod_of(template: dict, number: int) -> dict:
    labels = template["metadata"]["labels"]
    metadata = {"name": f"pod-{number}", "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


@pytest.mark.parametrize(("path", "value"), RAY_FAULTS.values(), ids=RAY_FAULTS)
def test_a_faulty_ray_object_is_refused(server, namespace, render, path, value):
    thing = changed(of_kind(render(), "RayService"), path, value)
    assert path.rpartition(".")[2] in server.create([thing], namespace, fails=True)


@pytest.mark.parametrize(("kind", "path", "value"), CORE_FAULTS.values(), ids=CORE_FAULTS)
def test_a_faulty_core_object_is_refused(server, namespace, render, kind, path, value):
    server.create([changed(of_kind(render(), kind), path, value)], namespace, fails=True)


POD_FAULTS = {
    "a volume that isn't there": lambda pod: pod["containers"][0]["volumeMounts"][0].update(name="nowhere"),
    "an owner who may be root": lambda pod: pod["securityContext"].update(runAsUser=-1),
    "more wanted than allowed": lambda pod: pod["containers"][0]["resources"]["requests"].update(cpu="1000"),
    "a port's name that is too long": lambda pod: pod["containers"][0]["ports"][0].update(name="metrics-of-the-node"),
}


@pytest.mark.parametrize("spoil", POD_FAULTS.values(), ids=POD_FAULTS)
def test_a_pod_that_no_schema_finds_fault_with_is_refused(server, namespace, render, custom, spoil):
    thing = copy.deepcopy(of_kind(render(), "RayService"))
    template = next(templates(thing))
    spoil(template["spec"])
    assert not custom.faults(thing)
    server.create([pod_of(template, 0)], namespace, fails=True)
