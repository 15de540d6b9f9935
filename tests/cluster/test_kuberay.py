"""The chart's objects, in every form that it has: schemas, and what no schema says."""

from __future__ import annotations

import copy
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.evaluation.config import EvalConfig
from services.serving.app import build
from services.serving.config import ServeConfig
from services.training.config import TrainConfig
from tests.cluster.conftest import CHART, ROOT, run, tool
from tests.services.cluster import free_port

pytest.importorskip("kubernetes_validate", reason="scripts/cluster-tools installs it")
from tests.cluster.schemas import CustomKinds, core_faults

GPU = ["-f", str(CHART / "values-gpu.yaml")]
EVERYTHING = (
    "secrets.tls=tls,secrets.tenants=tenants,monitoring=true,engine.cache.storageClass=fast,engine.nodeSelector.pool=a,"
    "gateway.enabled=true,gateway.className=envoy,gateway.host=segcore.example.org,gateway.tlsSecret=tls"
)
TRAIN = ["--set", "run=train", "--set-file", "config=examples/train-smollm2.yaml"]
EVAL = ["--set", "run=eval", "--set-file", "config=examples/eval-smoke.yaml"]
PLAIN = ["--set", "operator=false,secrets.ray=ray"]
FORMS = {
    "service": [],
    "service, GPUs, everything": [*GPU, "--set", EVERYTHING],
    "train": TRAIN,
    "train, GPUs": [*GPU, *TRAIN],
    "eval": EVAL,
    "cluster": ["--set", "run=cluster"],
    "cluster, GPUs": [*GPU, "--set", "run=cluster"],
    "service, no operator": PLAIN,
    "service, no operator, GPUs, everything": [*GPU, "--set", EVERYTHING, *PLAIN],
    "cluster, no operator": [*PLAIN, "--set", "run=cluster"],
}
# Kinds of others, whose definitions aren't at hand.
UNCHECKED = {"Gateway", "GRPCRoute", "HTTPRoute", "PodMonitor"}


@pytest.fixture(params=FORMS, scope="module")
def objects(request, render) -> list[dict]:
    return render(*FORMS[request.param])


@pytest.fixture(scope="module")
def custom(crds: Path) -> CustomKinds:
    return CustomKinds(crds)


def of_kind(objects: list[dict], kind: str) -> dict:
    return next(thing for thing in objects if thing["kind"] == kind)


def pods(thing: Any) -> Iterator[dict]:
    """Every pod's specification somewhere in an object."""
    if isinstance(thing, dict):
        if "containers" in thing:
            yield thing
        for below in thing.values():
            yield from pods(below)
    elif isinstance(thing, list):
        for below in thing:
            yield from pods(below)


def test_helm_finds_no_fault():
    run(tool("helm"), "lint", "--strict", str(CHART))


def test_objects_are_as_their_schemas_say(objects, custom):
    for thing in objects:
        if thing["kind"] in UNCHECKED:
            continue
        faults = custom.faults(thing) if thing["apiVersion"].startswith("ray.io/") else core_faults(thing)
        assert not faults, (thing["kind"], thing["metadata"]["name"])


RAY_FAULTS = {
    "misspelt": ("rayClusterConfig.workerGroupSpecs.0.minReplicaz", 1),
    "a word for a number": ("rayClusterConfig.workerGroupSpecs.0.replicas", "one"),
    "a part of a pod that no pod has": ("rayClusterConfig.headGroupSpec.template.spec.container", []),
    "YAML where text is wanted": ("serveConfigV2", {"applications": []}),
    "no lower limit": ("rayClusterConfig.workerGroupSpecs.0.minReplicas", None),
}


@pytest.mark.parametrize(("path", "value"), RAY_FAULTS.values(), ids=RAY_FAULTS)
def test_a_faulty_ray_object_is_found(render, custom, path, value):
    thing = of_kind(render(), "RayService")
    assert custom.faults(changed(thing, path, value))


CORE_FAULTS = {
    "misspelt": ("PodDisruptionBudget", "maxUnavailablee", 1),
    "a port that is a list": ("Service", "ports.0.port", [9100]),
    "no selector": ("StatefulSet", "selector", None),
    "a part of a container that none has": ("StatefulSet", "template.spec.containers.0.imagee", "x"),
    "a rule that is text": ("NetworkPolicy", "ingress.0", "everybody"),
    "no size": ("PersistentVolumeClaim", "resources.requests", 20),
}


@pytest.mark.parametrize(("kind", "path", "value"), CORE_FAULTS.values(), ids=CORE_FAULTS)
def test_a_faulty_core_object_is_found(render, kind, path, value):
    assert core_faults(changed(of_kind(render(), kind), path, value))


def changed(thing: dict, path: str, value: object) -> dict:
    """A copy with something else, or nothing, at a path below `spec`."""
    made = copy.deepcopy(thing)
    *way, last = path.split(".")
    place: Any = made["spec"]
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    if value is None:
        del place[last]
    elif isinstance(place, list):
        place[int(last)] = value
    else:
        place[last] = value
    return made


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "run=tran"], "service, train, eval or cluster"),
        (["--set", "run=train"], "--set-file config=FILE"),
        (["--set", "gateway.enabled=true"], "gateway.className"),
        (["--set", "operator=false"], "secrets.ray"),
        ([*TRAIN, *PLAIN], "needs KubeRay"),
    ],
)
def test_values_that_make_no_sense_are_refused(options, said):
    assert said in run(tool("helm"), "template", "x", str(CHART), *options, fails=True)


def test_nobody_is_root_or_writes_beside_volumes(objects):
    for pod in pods(objects):
        assert pod["securityContext"]["runAsNonRoot"], pod
        for container in pod["containers"]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"]
            assert not rights["allowPrivilegeEscalation"]
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted <= {volume["name"] for volume in pod["volumes"]} | {"data"}


def test_services_and_budgets_select_pods_that_there_are(objects):
    labels = [
        template["metadata"]["labels"]
        for thing in objects
        for template in templates(thing)
        if "labels" in template.get("metadata", {})
    ]
    for thing in objects:
        wanted = {
            "Service": lambda spec: spec["selector"],
            "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
            "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
        }.get(thing["kind"])
        if wanted is not None:
            assert any(wanted(thing["spec"]).items() <= found.items() for found in labels), thing["metadata"]["name"]


def templates(thing: Any) -> Iterator[dict]:
    if isinstance(thing, dict):
        if "containers" in thing.get("spec", {}):
            yield thing
        for below in thing.values():
            yield from templates(below)
    elif isinstance(thing, list):
        for below in thing:
            yield from templates(below)


def test_the_service_is_serve_yaml_with_its_own_values(render):
    spec = of_kind(render(*GPU, "--set", "serve.slots=3,secrets.tls=tls"), "RayService")["spec"]
    serve = yaml.safe_load(spec["serveConfigV2"])
    ours = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())
    (application,), (plain,) = serve.pop("applications"), ours.pop("applications")
    assert serve == ours
    args, before = application.pop("args"), plain.pop("args")
    assert application == plain
    assert {name for name, value in before.items() if args.get(name) != value} == {
        *("fronts", "autoscaling", "tenants", "sessions")
    }
    assert args["slots"] == 3
    groups = {group["groupName"]: group for group in spec["rayClusterConfig"]["workerGroupSpecs"]}
    assert args["fronts"] == groups["front"]["replicas"]
    assert args["autoscaling"]["max_replicas"] == groups["engine"]["maxReplicas"]
    for group, resources in (("front", args["front_resources"]), ("engine", args["engine_resources"])):
        given = json.loads(json.loads(groups[group]["rayStartParams"]["resources"]))
        assert resources.items() <= given.items()


def test_files_that_a_service_reads_are_mounted(render):
    spec = of_kind(render(*FORMS["service, GPUs, everything"]), "RayService")["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    for group in spec["rayClusterConfig"]["workerGroupSpecs"]:
        mounts = {mount["mountPath"] for mount in next(pods(group))["containers"][0]["volumeMounts"]}
        for name in ("tls_certificate", "tls_key", "tenants", "redis_password"):
            assert str(Path(application["args"][name]).parent) in mounts


def test_what_a_service_runs_can_be_built(render):
    for form in ("service", "service, GPUs, everything"):
        spec = of_kind(render(*FORMS[form]), "RayService")["spec"]
        (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
        build(ServeConfig(**application["args"]))


@pytest.mark.parametrize(("form", "kind", "read"), [("train", "train", TrainConfig), ("eval", "eval", EvalConfig)])
def test_a_jobs_configuration_is_read_where_it_lies(render, tmp_path, form, kind, read):
    objects = render(*FORMS[form])
    text = of_kind(objects, "ConfigMap")["data"]["config.json"]
    config = read.model_validate_json(text)
    assert str(config.storage).startswith("/shared/")
    job = of_kind(objects, "RayJob")["spec"]
    head = next(pods(job["rayClusterSpec"]["headGroupSpec"]))
    (mount,) = (m for m in head["containers"][0]["volumeMounts"] if m["name"] == "run")
    assert f"{mount['mountPath']}/config.json" in job["entrypoint"]


@contextmanager
def redis_of(objects: list[dict], folder: Path) -> Iterator[tuple[int, Callable[[], int]]]:
    """The chart's Redis by the command and the probe as they are written, but for folders and the port: the port, and
    what the probe says once it has been content."""
    (container,) = next(pods(of_kind(objects, "StatefulSet")))["containers"]
    (folder / "password").write_text("secret")
    port = free_port()

    def here(command: str) -> list[str]:
        for mount in container["volumeMounts"]:
            command = command.replace(mount["mountPath"], str(folder))
        return ["sh", "-c", command.replace("redis-cli", f"redis-cli -p {port}")]

    assert container["command"] == ["sh", "-c"]
    server = subprocess.Popen(here(f"{container['args'][0]} --port {port}"), stdout=subprocess.DEVNULL)
    probe = here(container["readinessProbe"]["exec"]["command"][-1])

    def asked() -> int:
        return subprocess.run(probe, stderr=subprocess.DEVNULL).returncode

    try:
        until = time.monotonic() + 60
        while asked():
            assert server.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        yield port, asked
    finally:
        server.kill()
        server.wait()


def test_redis_runs_as_it_is_told_to(render, tmp_path):
    with redis_of(render(), tmp_path) as (_, asked):
        (tmp_path / "password").write_text("another")
        assert asked()
        assert (tmp_path / "appendonlydir").is_dir()
