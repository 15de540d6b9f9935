"""The front: the application's ingress with ports of its own, for gRPC and HTTP, TLS included.

Serve's proxy speaks plaintext only, knows no `grpc.health.v1`, and costs a hop; a replica of this deployment listens
itself, and calls the engines' handle. Replicas on one node share the ports (SO_REUSEPORT), so that a new one takes over
before the old one is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import Any

import grpc
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.serving.config import ServeConfig
from services.serving.decoding import Decoding
from services.serving.gate import Gate
from services.serving.ingress import SERVICES, Ingress
from services.serving.logs import log_as_told
from services.serving.tls import Certificate
from services.serving.web import web_app

log = logging.getLogger(__name__)

_OPTIONS = [
    ("grpc.so_reuseport", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # our clients' is 30 s
    ("grpc.max_connection_age_ms", 30 * 60_000),  # so that clients find fronts that came later
    ("grpc.max_connection_age_grace_ms", 60 * 60_000),
]
_WATCH_SECONDS = 5.0
_ENGINE_SECONDS = 10.0
_DRAIN_SECONDS = 10


class Front(Ingress):
    """The deployment: an ingress that listens while its replica lives."""

    async def __init__(self, engine: Any, config: ServeConfig) -> None:  # type: ignore[misc] # Serve awaits it
        log_as_told()
        super().__init__(engine, config)
        self._listener = Listener(self, self._gate)
        await self._listener.start()

    async def __del__(self) -> None:
        # Serve awaits it before it ends the replica.
        if hasattr(self, "_listener"):
            await self._listener.stop()


class Listener:
    """The servers of one front."""

    def __init__(self, ingress: Ingress, gate: Gate) -> None:
        """Raises ConfigError for a certificate that can't be used."""
        self._ingress, self._gate, self._config = ingress, gate, gate.config
        self._certificate = _certificate(gate.config)
        self._health = health.aio.HealthServicer()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Listen. Raises OSError or RuntimeError if a port can't be had."""
        self._grpc, self._http = self._grpc_server(), _HttpServer(self._http_config())
        await self._grpc.start()
        sockets = [_listening(self._config.host, self._config.http_port)]
        self._tasks = [asyncio.create_task(self._http.serve(sockets)), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        """Turn new clients away, and let calls end, for some seconds."""
        if not self._tasks:
            return
        serving, watching = self._tasks
        watching.cancel()
        await self._health.enter_graceful_shutdown()
        self._http.should_exit = True
        await self._grpc.stop(_DRAIN_SECONDS)
        await serving

    def _grpc_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(options=_OPTIONS, interceptors=[Decoding(SERVICES)])
        for add in SERVICES.values():
            add(self._ingress, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._config.grpc_reflection:
            reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        address = f"{self._config.host}:{self._config.grpc_port}"
        if self._certificate is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, self._certificate.grpc_credentials())
        return server

    def _http_config(self) -> uvicorn.Config:
        config = uvicorn.Config(
            web_app(self._gate),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=_DRAIN_SECONDS,
        )
        config.load()
        config.ssl = None if self._certificate is None else self._certificate.ssl_context()
        return config

    async def _watch(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(_WATCH_SECONDS)

    async def look(self) -> None:
        """Tell health checks whether engines answer, and take up a renewed certificate."""
        status = health_pb2.HealthCheckResponse.SERVING
        try:
            await asyncio.wait_for(self._gate.engines.info(), _ENGINE_SECONDS)
        except Exception as error:
            log.warning("no engine answers: %s", type(error).__name__)
            status = health_pb2.HealthCheckResponse.NOT_SERVING
        for name in SERVICES:
            await self._health.set(name, status)
        if self._certificate is not None:
            self._certificate.renew()


class _HttpServer(uvicorn.Server):  # type: ignore[misc]
    """One that leaves signals to the process it is in."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def _listening(host: str, port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind((host, port))
    return made


def _certificate(config: ServeConfig) -> Certificate | None:
    if config.tls_certificate is None or config.tls_key is None:
        return None
    return Certificate(config.tls_certificate, config.tls_key, config.tls_client_ca)
