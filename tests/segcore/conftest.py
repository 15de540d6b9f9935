"""A real Redis server, and what tests of past KV share."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import torch

from segcore.engine.engine import Engine


class RedisServer:
    """A server of its own on a unix socket, which tests may stop, kill and start again."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.socket, self._options = folder / "redis.sock", (*options, "--dir", str(folder))
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["redis-server", "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen([*command, *self._options], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if b"eady to accept connections" in line:
                return
        raise AssertionError("redis-server didn't start")

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def client(self, **options: str) -> redis.Redis:
        return redis.Redis.from_url(self.url, **options)


@pytest.fixture(scope="session")
def _redis_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if shutil.which("redis-server") is None:
        pytest.fail("redis-server isn't installed: make redis")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def redis_server(_redis_session: RedisServer) -> RedisServer:
    """The session's server, empty."""
    with _redis_session.client() as client:
        client.flushall()
    return _redis_session


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that the test may do anything to."""
    if shutil.which("redis-server") is None:
        pytest.fail("redis-server isn't installed: make redis")
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder)
    server.start()
    yield server
    server.signal(signal.SIGCONT)
    server.kill()


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def running() -> Iterator[Callable[[Engine], Engine]]:
    """Takes the engines that a test makes: at its end their books must balance, and they are shut down."""
    made: list[Engine] = []

    def run(engine: Engine) -> Engine:
        made.append(engine)
        return engine

    yield run
    for engine in made:
        engine.check_integrity()
        engine.shutdown()
