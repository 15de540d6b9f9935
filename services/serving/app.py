"""The application: fronts, and the engines behind them."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from services.serving.config import ServeConfig
from services.serving.engine_deployment import EngineDeployment
from services.serving.front import Front
from services.serving.ingress import SERVICES, Ingress

APPLICATION = "segcore"
_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"


# A request is short, or waits on the engine without holding anything, so Serve's own limit must not come first.
_MAX_ONGOING = 10_000
# One event loop for requests, routing and our code, and messages between replicas by gRPC: benchmarks/front.py has what
# that is worth.
QUICK = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}


def build(
    config: ServeConfig,
    replicas: int | None = None,
    *,
    engine: type[Any] = EngineDeployment,
    ingress: type[Ingress] = Front,
    quick: dict[str, str] = QUICK,
) -> serve.Application:
    """Fronts and engines; a session's calls all reach the same engine replica. Raises ConfigError.

    replicas: other than the configuration says, to scale a running application. engine, ingress, quick: others than a
    service's own are for measurements.
    """
    config.engine_config()  # a configuration that can't work fails here, not in a replica
    environment = quick | {"SEGCORE_LOG": "json"}
    if config.tracing is not None:
        environment["RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"] = config.tracing
        environment["RAY_SERVE_TRACING_SAMPLING_RATIO"] = str(config.tracing_ratio)
    engines = serve.deployment(
        name="engine",
        num_replicas=replicas or config.replicas,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": config.gpus_per_replica,
            "runtime_env": {"env_vars": environment},
        },
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER, request_router_kwargs={"num_fallback_replicas": 0}
        ),
    )(engine)
    fronts = serve.deployment(
        name="ingress",
        num_replicas=config.fronts,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options={"num_cpus": 0.1, "runtime_env": {"env_vars": environment}},
    )(ingress)
    return fronts.bind(engines.bind(config), config)


def servicer_functions() -> list[str]:
    """What Serve's gRPC proxy needs to know our services."""
    return [f"{add.__module__}.{add.__name__}" for add in SERVICES.values()]
