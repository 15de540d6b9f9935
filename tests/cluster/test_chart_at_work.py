"""What the chart's objects say is run, run as it is written, on nodes of this machine: Ray's, the service, both jobs.

KubeRay's part is played by its own rules: nodes are started by `ray start` with `rayStartParams`, the service is put to
the dashboard, a job is submitted by `ray job submit`. Ports and folders are this machine's, and Serve has no proxies,
since nodes with one address can't have one each.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
import yaml

from services.evaluation.config import EvalConfig
from services.evaluation.results import read_results
from services.evaluation.run import RESULTS, Plan
from services.training.config import TrainConfig
from services.training.metrics import LINES, read_lines
from tests.cluster.conftest import ROOT
from tests.cluster.test_compose_up import TOKENS, Service
from tests.conftest import SERVED_SEGMENT
from tests.services.cluster import Cluster, free_port, open_cluster, wait_for
from tests.services.evaluation.conftest import values as evaluation_values
from tests.services.training.conftest import text_file
from tests.services.training.conftest import values as training_values

pytest.importorskip("kubernetes_validate", reason="scripts/cluster-tools installs it")
from tests.cluster.test_kuberay import of_kind, pods, redis_of

__all__ = ["evaluation_values", "text_file", "training_values"]

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


class Release(NamedTuple):
    """The chart's objects, for a tiny model, and nodes of this machine. here: a text with our own folders and ports."""

    cluster: Cluster
    objects: list[dict]
    here: Callable[[str], str]
    http_port: int


def node_options(group: dict[str, Any]) -> list[str]:
    """As KubeRay writes them into the line that a shell reads."""
    return shlex.split(" ".join(f"--{name}={value}" for name, value in group["rayStartParams"].items()))


@pytest.fixture(scope="module")
def release(render, model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    folder, http_port = tmp_path_factory.mktemp("release"), free_port()
    tiny = {"model": str(model_directory), "dtype": "float32", "device": "cpu", "threads": 1, "chunk_tokens": 64}
    tiny |= {"segment": SERVED_SEGMENT, "grpc_port": free_port(), "http_port": http_port, "host": "127.0.0.1"}
    tiny |= {"replicas": 1, "autoscaling": {"max_replicas": 1}, "past_directory": str(folder / "past")}
    (folder / "values.yaml").write_text(yaml.safe_dump({"serve": tiny}))
    objects = render("-f", str(folder / "values.yaml"))
    spec = of_kind(objects, "RayService")["spec"]["rayClusterConfig"]
    front, engine = spec["workerGroupSpecs"]
    with redis_of(objects, folder) as (port, _):

        def here(text: str) -> str:
            text = text.replace("x-store-redis:6379", f"127.0.0.1:{port}")
            return text.replace("/etc/segcore/redis", str(folder)).replace("/shared", str(folder / "shared"))

        with open_cluster(2, node_options(spec["headGroupSpec"]), node_options(front)) as cluster:
            cluster.join(*node_options(engine))
            yield Release(cluster, objects, here, http_port)


def test_the_service_answers_and_its_sessions_outlive_an_upgrade(release):
    """Put to the dashboard as the operator does it; again with another setting, while a session is there."""
    spec = of_kind(release.objects, "RayService")["spec"]
    config = yaml.safe_load(release.here(spec["serveConfigV2"])) | {"proxy_location": "Disabled"}
    (front,) = (group for group in spec["rayClusterConfig"]["workerGroupSpecs"] if group["groupName"] == "front")
    probe = next(pods(front))["containers"][0]["readinessProbe"]["httpGet"]
    url = f"{probe['scheme'].lower()}://127.0.0.1:{release.http_port}"
    with requests.Session() as http:
        http.trust_env = False
        put(http, release, config)
        wait_for(lambda: http.get(f"{url}{probe['path']}", timeout=60).ok)
        service = Service(http, url)
        service.upload("kept")
        before = engines(release)
        config["applications"][0]["args"]["slots"] = 5
        assert service.ask("kept", TOKENS)
        put(http, release, config)
        wait_for(lambda: engines(release) and not engines(release) & before)
        assert service.ask("kept", TOKENS)
        assert service.call("GET", "/v1/sessions/kept").json()["documents"][0]["finished"]
        http.delete(applications(release), timeout=60).raise_for_status()


def applications(release: Release) -> str:
    return f"{release.cluster.address}/api/serve/applications/"


def put(http: requests.Session, release: Release, config: dict) -> None:
    """Returns when it runs."""
    http.put(applications(release), json=config, timeout=60).raise_for_status()

    def status() -> str:
        return str(http.get(applications(release), timeout=60).json()["applications"]["segcore"]["status"])

    wait_for(lambda: status() == "RUNNING", lambda: status() if "FAILED" in status() else None)


def engines(release: Release) -> set[str]:
    """Names of the engines' replicas that run."""
    with requests.Session() as http:
        http.trust_env = False
        told = http.get(applications(release), timeout=60).json()["applications"]["segcore"]["deployments"]["engine"]
    return {each["replica_id"] for each in told["replicas"] if each["state"] == "RUNNING"}


def run_job(release: Release, render: Callable[..., list[dict]], kind: str, config: dict, folder: Path) -> str:
    """Run a RayJob's entry point, with its ConfigMap where it is mounted; returns what that says."""
    given = folder / "given.yaml"
    given.write_text(yaml.safe_dump(config))
    objects = render("--set", f"run={kind}", "--set-file", f"config={given}")
    ((name, text),) = of_kind(objects, "ConfigMap")["data"].items()
    (folder / name).write_text(release.here(text))
    entrypoint = of_kind(objects, "RayJob")["spec"]["entrypoint"].replace("/etc/segcore/run", str(folder))
    ray = str(Path(sys.executable).with_name("ray"))
    submit = [ray, "job", "submit", f"--address={release.cluster.address}", "--", *shlex.split(entrypoint)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(submit, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return release.here(text)


def test_a_training_run_trains(release, render, training_values, tmp_path):
    text = run_job(release, render, "train", training_values(tmp_path, name="job", steps=2), tmp_path)
    run = TrainConfig.model_validate_json(text).folder
    assert [line["step"] for line in read_lines(run / LINES) if "loss" in line] == [1, 2]


def test_an_evaluation_evaluates(release, render, evaluation_values, tmp_path):
    text = run_job(release, render, "eval", evaluation_values(tmp_path, name="job"), tmp_path)
    config = EvalConfig.model_validate_json(text)
    (run,) = config.storage.glob("job-*")
    assert set(read_results(run / RESULTS)) == set(Plan.of(config).keys)
