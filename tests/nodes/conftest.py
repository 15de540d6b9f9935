"""Ray nodes on this machine: one for the front, and others for engines and workers, which may be killed or stopped."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray import serve
from ray._private.node import Node
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.cluster_utils import Cluster

from services.serving.app import APPLICATION
from services.serving.config import ServeConfig
from tests.conftest import SERVED_SEGMENT
from tests.services.cluster import free_port

STORE_BYTES = 80_000_000
STARTS = 8
AGENTS = ("metrics_agent", "metrics_export", "dashboard_agent_listen", "runtime_env_agent")
# Ray would take a minute to notice that a node says nothing, and give up on its own processes after half a minute, as
# long as they may take to start on a busy machine.
SYSTEM = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1500,
    "health_check_failure_threshold": 4,
    "agent_register_timeout_ms": 300_000,
}


class Nodes:
    """The cluster. Its nodes know nothing of what becomes of them."""

    def __init__(self, workers: int, **head: object) -> None:
        self._cluster = Cluster()
        self._add(
            **{"num_cpus": 1, "resources": {"front": 1}, "include_dashboard": False, "_system_config": SYSTEM} | head
        )
        self.address: str = self._cluster.address
        self.workers = [self.add() for _ in range(workers)]

    def add(self) -> Node:
        """One more node, for an engine, or for a worker of two CPUs, as many as the front's node hasn't."""
        return self._add(num_cpus=2, resources={"engine": 1})

    def of(self, pid: int) -> int:
        """Which of the workers a process runs on."""
        return next(i for i in range(len(self.workers)) if pid in {each.pid for each in self._processes(i)})

    def kill(self, number: int) -> None:
        """End all processes of a node at once, and add another in its place."""
        self._signal(number, signal.SIGKILL)
        self.replace(number)

    @contextlib.contextmanager
    def stopped(self, number: int) -> Iterator[None]:
        """A node from which nothing comes, and which goes on afterwards as if no time had passed."""
        self._signal(number, signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(number, signal.SIGCONT)

    def replace(self, number: int) -> None:
        """Another node in the place of one that is gone."""
        self._cluster.remove_node(self.workers[number], allow_graceful=False)
        self.workers[number] = self.add()

    def end(self) -> None:
        processes = [each for node in self._cluster.list_all_nodes() for each in processes_of(node)]
        self._cluster.shutdown()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _add(self, **options: object) -> Node:
        """Ray waits half a minute for a node, and half of that for its agents' ports, unless those are given: on a busy
        machine that may be too short."""
        for _ in range(STARTS):
            before = psutil.Process().children()
            ports = {f"{agent}_port": free_port() for agent in AGENTS}
            try:
                return self._cluster.add_node(object_store_memory=STORE_BYTES, **ports, **options)
            except Exception as error:  # of no class of its own
                if "timed out during startup" not in str(error):
                    raise
                for process in set(psutil.Process().children()) - set(before):
                    process.kill()
        raise TimeoutError("no node starts")

    def _processes(self, number: int) -> list[psutil.Process]:
        return processes_of(self.workers[number])

    def _signal(self, number: int, signal_number: int) -> None:
        for process in self._processes(number):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal_number)


def processes_of(node: Node) -> list[psutil.Process]:
    """All that a node has started."""
    found = []
    for started in (info.process.pid for infos in node.all_processes.values() for info in infos):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(started)
            found += [process, *process.children(recursive=True)]
    return found


def running_engines() -> int:
    return serve.status().applications[APPLICATION].deployments["engine"].replica_states.get("RUNNING", 0)


@pytest.fixture(scope="package")
def service(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    """A service of a tiny model, a front and two engines, each on its node."""
    return ServeConfig(
        model=str(model_directory),
        dtype="float32",
        device="cpu",
        threads=1,
        segment=SERVED_SEGMENT,
        chunk_tokens=64,
        replicas=2,
        front_resources={"front": 1},
        engine_resources={"engine": 1},
        grpc_port=0,
        http_port=0,
        past_directory=tmp_path_factory.mktemp("past-kv"),
        sessions=str(tmp_path_factory.mktemp("sessions") / "sessions.sqlite"),
        lease_s=2.0,
        slots=4,
        max_sessions=32,
    )


@contextlib.contextmanager
def connected(make: Callable[[Path], Nodes], **environment: str) -> Iterator[Nodes]:
    """A cluster with a folder of its own, so that nobody else's Ray is taken for it or it for theirs; connected."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a short name: sockets are in it
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_TMPDIR": folder, **environment}.items():
            patch.setenv(name, value)
        made = make(Path(folder))
        try:
            ray.init(made.address, logging_level="WARNING", log_to_driver=False)
            yield made
        finally:
            ray.shutdown()
            made.end()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="package")
def nodes() -> Iterator[Nodes]:
    """A front's, and two for engines and workers."""
    training = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    with connected(lambda folder: Nodes(workers=2), **training) as made:
        yield made


def autoscaled(folder: Path) -> Nodes:
    """A front's node, and an autoscaler that adds and removes others: Ray's, with processes for machines.

    `ray.cluster_utils.AutoscalingCluster` would end every Ray of the machine as it starts, and needs a file that Ray's
    packages lack; so the provider is named as one of our own, for which no field of the configuration has a default.
    """
    port = free_port()
    provider = {
        "type": "external",
        "module": f"{FakeMultiNodeProvider.__module__}.FakeMultiNodeProvider",
        "head_node_id": FAKE_HEAD_NODE_ID,
        "gcs_address": f"{ray.util.get_node_ip_address()}:{port}",
        "launch_multiple": True,
        "disable_node_updaters": True,
    }
    engine = {"CPU": 1, "engine": 1, "object_store_memory": STORE_BYTES}
    config = {
        "cluster_name": "nodes",
        "max_workers": 2,
        "idle_timeout_minutes": 0.05,
        "provider": provider,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 1, "front": 1}, "node_config": {}, "max_workers": 0},
            "engine": {"resources": engine, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
    }
    config |= {name: [] for name in ("setup_commands", "head_setup_commands", "worker_setup_commands")}
    config["cluster_synced_files"] = []
    (folder / "autoscaling.json").write_text(json.dumps(config))
    return Nodes(
        workers=0,
        gcs_server_port=port,
        autoscaling_config=str(folder / "autoscaling.json"),
        _system_config=SYSTEM | {"enable_autoscaler_v2": True},
        env_vars={"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID, "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID},
    )


@pytest.fixture(scope="module")
def growing() -> Iterator[Nodes]:
    with connected(autoscaled, RAY_FAKE_CLUSTER="1", AUTOSCALER_UPDATE_INTERVAL_S="1") as made:
        yield made
