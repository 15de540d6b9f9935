"""A real Redis server for tests."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import redis


class RedisServer:
    """A server of its own on a unix socket, which tests may stop, kill and start again."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.socket, self._options = folder / "redis.sock", (*options, "--dir", str(folder))
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["redis-server", "--port", "0", "--unixsocket", str(self.socket), "--save", ""]
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
        import redis

        return redis.Redis.from_url(self.url, **options)
