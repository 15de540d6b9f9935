"""A headless Chromium, driven by its DevTools protocol: the little that tests and pictures of the page need."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tab:
    """One page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._ids = socket, itertools.count(1)
        self.complaints: list[str] = []  # errors of scripts, of the network, of the security policy

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=60)
            told = message.get("params", {}).get("entry", {}).get("level") != "verbose"
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded") and told:
                self.complaints.append(json.dumps(message["params"])[:500])
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    async def open(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Log", "DOM"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def js(self, expression: str) -> Any:
        """The value of an expression, awaited."""
        made = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in made, made["exceptionDetails"]
        return made["result"].get("value")

    async def until(self, expression: str, seconds: float = 60) -> None:
        """Wait for an expression to become true."""
        for _ in range(int(seconds / 0.05)):
            if await self.js(expression):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"not within {seconds} s: {expression}; {self.complaints}")

    async def choose_file(self, selector: str, file: Path) -> None:
        """Put a file into an <input type=file>."""
        root = (await self.call("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.call("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    async def drop_file(self, selector: str, file: Path) -> None:
        """Drag a file from outside over an element, and let go of it there."""
        where = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        place = await self.js(f"(({{x, y, width, height}}) => ({{x: x + width / 2, y: y + height / 2}}))({where})")
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            await self.call("Input.dispatchDragEvent", type=kind, data=data, **place)

    async def picture(self, file: Path, width: int, height: int) -> None:
        """What the page looks like, as PNG."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        await asyncio.sleep(0.3)
        made = await self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(made["data"]))  # noqa: ASYNC240


@asynccontextmanager
async def chromium() -> AsyncIterator[Tab]:
    """A new browser with one tab."""
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        quiet = ["--no-first-run", "--disable-background-networking", f"--user-data-dir={folder}"]
        process = await asyncio.create_subprocess_exec(
            PROGRAM, *options, *quiet, "--remote-debugging-port=0", "about:blank", stderr=asyncio.subprocess.DEVNULL
        )
        try:
            port = await _port(Path(folder) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as http:
                async with http.get(f"http://127.0.0.1:{port}/json/list") as response:
                    (page,) = [target for target in await response.json() if target["type"] == "page"]
                async with http.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=64 * 2**20) as socket:
                    yield Tab(socket)
        finally:
            process.kill()
            await process.wait()


async def _port(file: Path) -> int:
    for _ in range(600):
        if file.exists() and (text := file.read_text()).count("\n"):  # noqa: ASYNC240
            return int(text.splitlines()[0])
        await asyncio.sleep(0.05)
    raise AssertionError("Chromium didn't start")
