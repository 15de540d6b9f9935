"""The front: the application's ingress with ports of its own, for gRPC and HTTP, TLS included.

Serve's proxy speaks plaintext only, knows no `grpc.health.v1`, and costs a hop; a replica of this deployment listens
itself, and calls the engines' handle. Replicas on one node share the ports (SO_REUSEPORT), so that a new one takes over
before the old one is gone.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress

import grpc
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from ray.serve.handle import DeploymentHandle

from segcore.errors import SegcoreError
from services.serving.config import ServeConfig
from services.serving.ingress import SERVICES, Ingress
from services.serving.tls import Certificate

log = logging.getLogger(__name__)

_OPTIONS = [
    ("grpc.so_reuseport", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),  # our clients' is 30 s
    ("grpc.max_connection_age_ms", 30 * 60_000),  # so that clients find fronts that came later
    ("grpc.max_connection_age_grace_ms", 60 * 60_000),
]
_WATCH_SECONDS = 5.0
_ENGINE_SECONDS = 10.0
_DRAIN_SECONDS = 10.0


class Front(Ingress):
    """The ingress that listens by itself."""

    async def __init__(self, engine: DeploymentHandle, config: ServeConfig) -> None:
        super().__init__(engine, config)
        self._certificate = _certificate(config)
        self._health = health.aio.HealthServicer()
        self._grpc = await self._grpc_server()
        self._watcher = asyncio.create_task(self._watch())

    async def __del__(self) -> None:
        """Serve's call before it ends the replica: turn clients away, then let calls end."""
        if not hasattr(self, "_watcher"):
            return
        self._watcher.cancel()
        await self._health.enter_graceful_shutdown()
        await self._grpc.stop(_DRAIN_SECONDS)

    async def _grpc_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(options=_OPTIONS)
        for add in SERVICES.values():
            add(self, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._config.grpc_reflection:
            names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        address = f"{self._config.host}:{self._config.grpc_port}"
        if self._certificate is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, self._certificate.grpc_credentials())
        await server.start()
        return server

    async def _watch(self) -> None:
        """Tell health checks whether engines answer, and take up a renewed certificate."""
        while True:
            try:
                await asyncio.wait_for(self._engine.info.remote(), _ENGINE_SECONDS)
                status = health_pb2.HealthCheckResponse.SERVING
            except Exception as error:
                log.warning("no engine answers: %s", type(error).__name__)
                status = health_pb2.HealthCheckResponse.NOT_SERVING
            for name in SERVICES:
                await self._health.set(name, status)
            if self._certificate is not None:
                self._certificate.renew()
            await asyncio.sleep(_WATCH_SECONDS)


def _certificate(config: ServeConfig) -> Certificate | None:
    if config.tls_certificate is None or config.tls_key is None:
        return None
    return Certificate(config.tls_certificate, config.tls_key, config.tls_client_ca)
