"""Three Ray nodes on this machine: one for the front, and two for engines and workers, which may be killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._private.node import Node
from ray.cluster_utils import Cluster

from services.serving.config import ServeConfig
from tests.conftest import SERVED_SEGMENT

STORE_BYTES = 80_000_000


class Nodes:
    """The cluster. A node that is killed says nothing first: its processes are gone."""

    def __init__(self) -> None:
        # Ray would take 13 seconds to notice that a node is gone.
        quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 8}
        self._cluster = Cluster()
        self._add(num_cpus=1, resources={"front": 1}, include_dashboard=False, _system_config=quick)
        self.address: str = self._cluster.address
        self.workers = [self.add(), self.add()]

    def add(self) -> Node:
        """One more node for an engine and a worker."""
        return self._add(num_cpus=2, resources={"engine": 1})

    def replace(self, number: int) -> None:
        """Kill a node, and add another in its place."""
        self._cluster.remove_node(self.workers[number], allow_graceful=False)
        self.workers[number] = self.add()

    def end(self) -> None:
        self._cluster.shutdown()

    def _add(self, **options: object) -> Node:
        return self._cluster.add_node(object_store_memory=STORE_BYTES, **options)


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
        slots=4,
        max_sessions=32,
    )


@pytest.fixture(scope="package")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "RAY_TRAIN_V2_ENABLED", "1")
        patch.setitem(os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        made = Nodes()
        try:
            ray.init(made.address, logging_level="WARNING", log_to_driver=False)
            yield made
        finally:
            ray.shutdown()
            made.end()
