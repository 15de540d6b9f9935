"""A front without Ray: its servers in a thread, before an engine in this process, behind a handle as Serve's."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine
from typing import Any, Self

from services.serving.config import ServeConfig
from services.serving.engine_deployment import EngineDeployment
from services.serving.front import Listener
from services.serving.ingress import Ingress


class LocalHandle:
    """Calls methods of an object as a DeploymentHandle calls a replica's."""

    def __init__(self, target: Any, method: str = "", stream: bool = False) -> None:
        self._target, self._method, self._stream = target, method, stream

    def options(self, *, session_id: str = "", stream: bool = False, _by_reference: bool = True) -> LocalHandle:
        return LocalHandle(self._target, self._method, stream)

    def __getattr__(self, name: str) -> LocalHandle:
        return LocalHandle(self._target, name, self._stream)

    def remote(self, *args: Any, **named: Any) -> Any:
        called = getattr(self._target, self._method)(*args, **named)
        return _Stream(called) if self._stream else asyncio.ensure_future(called)


class _Stream:
    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        return await anext(self._generator)

    def cancel(self) -> None:
        self._closing = asyncio.ensure_future(self._generator.aclose())


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(300)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class RunningFront:
    """A front that listens until `close`, on the engine's loop."""

    def __init__(self, loop: Loop, engine: EngineDeployment, config: ServeConfig) -> None:
        self.config = config.model_copy(update={"grpc_port": free_port(), "http_port": free_port()})
        self.call = loop.call
        self.call(self._start(engine))

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.config.grpc_port}"

    @property
    def http(self) -> str:
        return f"http{'s' if self.config.tls_key else ''}://127.0.0.1:{self.config.http_port}"

    def close(self) -> None:
        self.call(self.listener.stop())

    async def _start(self, engine: EngineDeployment) -> None:
        ingress = Ingress(LocalHandle(engine), self.config)  # type: ignore[arg-type]
        self.gate, self.listener = ingress._gate, Listener(ingress, ingress._gate)
        await self.listener.start()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
