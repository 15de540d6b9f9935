"""A service on this machine, on a Ray of its own: what `segcore serve`, `segcore ask` and the demo run."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from segcore import errors
from segcore.errors import SegcoreError, Unavailable
from services.local_ray import prepare_ray, start_ray
from services.serving.config import ServeConfig


@contextmanager
def local_service(config: ServeConfig, most_replicas: int = 0) -> Iterator[str]:
    """Run a service on this machine, on a Ray of its own unless one is connected; yields its gRPC address.

    most_replicas: of engines, if there may be more later than the configuration says.

    Ports that are 0 are chosen freely. Everything that was started is stopped at the end.
    """
    prepare_ray()
    import ray
    from ray import serve

    from services.serving.app import APPLICATION, build

    own_ray = not ray.is_initialized()
    config = _with_resources(config, one_node=own_ray)
    application = build(config)
    if own_ray:
        start_ray(max(config.replicas, most_replicas) + 1)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        _start_serve(config)
        try:
            # Others may ask Serve for more or fewer engines, where it doesn't decide that by itself.
            by_others = config.autoscaling is None
            serve.run(application, name=APPLICATION, route_prefix="/", external_scaler_enabled=by_others)
        except RuntimeError as error:
            deployments = serve.status().applications[APPLICATION].deployments.values()
            raise cause("\n".join(deployment.message for deployment in deployments)) from error
        yield f"{config.host}:{config.grpc_port}"
    finally:
        serve.delete(APPLICATION)  # lets the engine end its work and clear its disk
        if own_ray:
            ray.shutdown()


def scale(replicas: int, timeout_s: float = 200) -> None:
    """Have so many engines; returns once they run, and no other. Raises Unavailable if that takes longer.

    It is what Serve's own REST call for external scalers does: no replica that stays is touched.
    """
    import ray
    from ray import serve
    from ray.serve._private.common import DeploymentID
    from ray.serve.context import _get_global_client

    from services.serving.app import APPLICATION

    engine, ends = DeploymentID("engine", APPLICATION), time.monotonic() + timeout_s
    ray.get(_get_global_client()._controller.update_deployment_replicas.remote(engine, replicas))
    while True:
        states = serve.status().applications[APPLICATION].deployments["engine"].replica_states
        if {state: count for state, count in states.items() if count} == {"RUNNING": replicas}:
            return
        if time.monotonic() > ends:
            raise Unavailable(f"{replicas} engines were asked for, and these are there: {states}")
        time.sleep(0.1)


def _start_serve(config: ServeConfig) -> None:
    """Start Serve, without proxies of its own unless the configuration asks for its gRPC one."""
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions

    from services.serving.app import servicer_functions

    if config.serve_grpc_port is None:
        serve.start(proxy_location=ProxyLocation.Disabled)
        return
    serve.start(
        http_options=HTTPOptions(host="127.0.0.1", port=_free_port()),
        grpc_options=gRPCOptions(port=config.serve_grpc_port, grpc_servicer_functions=servicer_functions()),
    )


def cause(report: str) -> SegcoreError:
    """Why replicas didn't start: the last error of ours in what Serve reports of them, or the whole report."""
    ours = re.findall(r"^segcore\.errors\.(\w+): (.+)$", report, re.MULTILINE)
    if not ours:
        return Unavailable(f"the service didn't start: {report}")
    name, message = ours[-1]
    kind: type[SegcoreError] = getattr(errors, name)
    return kind(message)


def _with_resources(config: ServeConfig, *, one_node: bool) -> ServeConfig:
    """Fill in what is left to this machine: free ports, and its cores shared between the replicas.

    one_node: whether replicas have no choice of nodes.

    Ray would otherwise set each replica to as many threads as the CPUs it reserves.
    """
    cores = psutil.cpu_count(logical=False) or 1
    anywhere: dict[str, Any] = {"front_resources": {}, "engine_resources": {}} if one_node else {}
    return config.model_copy(
        update=anywhere
        | {
            "grpc_port": config.grpc_port or _free_port(),
            "http_port": config.http_port or _free_port(),
            "serve_grpc_port": _free_port() if config.serve_grpc_port == 0 else config.serve_grpc_port,
            "threads": config.threads or max(1, cores // config.replicas),
        }
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
