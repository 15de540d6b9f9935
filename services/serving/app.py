"""The application: an ingress in front of engines."""

from __future__ import annotations

from ray import serve
from ray.serve.config import RequestRouterConfig

from services.serving.config import ServeConfig
from services.serving.engine_deployment import EngineDeployment
from services.serving.ingress import Ingress

APPLICATION = "segcore"
_STUBS = "protos.gen.segcore.v1.segcore_pb2_grpc"
_SERVICES = ("SessionService", "DocumentService", "GenerationService", "InfoService")
_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"


# A request is short, or waits on the engine without holding anything, so Serve's own limit must not come first.
_MAX_ONGOING = 10_000


def build(config: ServeConfig, replicas: int | None = None) -> serve.Application:
    """Ingress in front of engines; a session's calls all reach the same engine replica. Raises ConfigError.

    replicas: other than the configuration says, to scale a running application.
    """
    config.engine_config()  # a configuration that can't work fails here, not in a replica
    engine = serve.deployment(
        name="engine",
        num_replicas=replicas or config.replicas,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options={"num_cpus": 1, "num_gpus": config.gpus_per_replica},
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER, request_router_kwargs={"num_fallback_replicas": 0}
        ),
    )(EngineDeployment)
    ingress = serve.deployment(name="ingress", max_ongoing_requests=_MAX_ONGOING, ray_actor_options={"num_cpus": 0.1})(
        Ingress
    )
    return ingress.bind(engine.bind(config), config)


def servicer_functions() -> list[str]:
    """What Serve's gRPC proxy needs to know our services."""
    return [f"{_STUBS}.add_{service}Servicer_to_server" for service in _SERVICES]
