"""What stands between a client and an engine, and what it costs: the ways in beside a bare gRPC server, in one run.

.venv/bin/python -m benchmarks.front             # adds to benchmarks/results/serving.json

The engine is a stand-in that answers at once, behind the real router; so what is measured is the way there and back.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from benchmarks.record import RESULTS, ROOT, Figure, records, write
from protos.gen.segcore.v1 import segcore_pb2 as pb
from protos.gen.segcore.v1 import segcore_pb2_grpc as stubs
from services.serving.messages import AnswerPart, ServerInfo, SessionInfo

COMMAND = "-m benchmarks.front"
MESSAGES, ROUNDS, CALLS = 1000, 7, 300
OPTIMIZED = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
MODES: dict[str, tuple[str, dict[str, str]]] = {
    "bare": ("a grpc.aio server with nothing behind it", {}),
    "proxy": ("Serve's proxy, as it comes", {}),
    "haproxy": ("Serve's HAProxy mode, optimised for throughput", {"RAY_SERVE_ENABLE_HA_PROXY": "1"} | OPTIMIZED),
    "front": ("our front", {}),
    "front_tls": ("our front over TLS", {}),
}
# The best per message that was measured with Serve before there was a front, on such a machine: HAProxy mode.
BEST_MS = 0.21


class StandIn:
    """Answers as an engine's replica does, without one."""

    def __init__(self, config: Any) -> None:
        pass

    async def info(self) -> ServerInfo:
        return ServerInfo(**dict.fromkeys(ServerInfo.__dataclass_fields__, 0) | dict.fromkeys(_TEXTS, "x"))

    async def get(self, *_: Any, **__: Any) -> SessionInfo:
        return SESSION

    async def generate(self, *_: Any, **__: Any) -> AsyncIterator[AnswerPart]:
        for _i in range(MESSAGES - 1):
            yield PART
        yield LAST


_TEXTS = ("version", "model", "architecture", "policy")
PART, LAST = AnswerPart(text=" token"), AnswerPart(text=" token", finish_reason="length")
SESSION = SessionInfo(
    session_id="x", model="x", create_time=0.0, processed_tokens=0, pending_tokens=0, segments=0, documents=[]
)


class Bare(stubs.SessionServiceServicer, stubs.GenerationServiceServicer):
    """The same answers from a server alone."""

    async def GetSession(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.GetSessionResponse(session=pb.Session(session_id="x"))

    async def Generate(self, request: Any, context: Any) -> Any:  # noqa: N802
        for _ in range(MESSAGES):
            yield pb.GenerateResponse(text=" token")


async def measured(channel: grpc.aio.Channel) -> dict[str, float]:
    """Milliseconds: of a unary call, to a stream's first message, and for each further one; calls a second."""
    sessions, generation = stubs.SessionServiceStub(channel), stubs.GenerationServiceStub(channel)
    metadata = [("session_id", "x")]

    async def unary() -> float:
        began = time.perf_counter()
        await sessions.GetSession(pb.GetSessionRequest(session_id="x"), metadata=metadata, timeout=30)
        return (time.perf_counter() - began) * 1e3

    async def stream() -> tuple[float, float]:
        began = time.perf_counter()
        call = generation.Generate(pb.GenerateRequest(session_id="x", question="?"), metadata=metadata, timeout=60)
        await call.read()
        first = time.perf_counter()
        count = 1
        while await call.read() is not grpc.aio.EOF:
            count += 1
        assert count == MESSAGES, count
        return (first - began) * 1e3, (time.perf_counter() - first) * 1e3 / (count - 1)

    async def many() -> None:
        for _ in range(CALLS // 16):
            await unary()

    for _ in range(20):
        await unary()
    await stream()
    calls = [await unary() for _ in range(CALLS)]
    streams = [await stream() for _ in range(ROUNDS)]
    began = time.perf_counter()
    await asyncio.gather(*(many() for _ in range(16)))
    return {
        "unary_ms": statistics.median(calls),
        "first_message_ms": statistics.median(first for first, _ in streams),
        "message_ms": statistics.median(each for _, each in streams),
        "calls_per_s": 16 * (CALLS // 16) / (time.perf_counter() - began),
    }


def run(mode: str) -> dict[str, float]:
    """One way in, in this process."""
    if mode == "bare":
        port = _port()
        server = subprocess.Popen([sys.executable, "-m", "benchmarks.front", "serve-bare", str(port)], cwd=ROOT)
        try:
            return asyncio.run(measure(port))
        finally:
            server.kill()
            server.wait()
    with tempfile.TemporaryDirectory() as folder:
        return _on_ray(mode, Path(folder))


def _on_ray(mode: str, folder: Path) -> dict[str, float]:
    from services.local_ray import prepare_ray

    prepare_ray()
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions

    from services.serving.app import build, servicer_functions
    from services.serving.config import ServeConfig
    from services.serving.ingress import Ingress

    certificate = _certificate(folder) if mode == "front_tls" else (None, None)
    config = ServeConfig(
        grpc_port=_port(), http_port=_port(), tls_certificate=certificate[0], tls_key=certificate[1], device="cpu"
    )
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=150_000_000)
    try:
        if mode.startswith("front"):
            serve.start(proxy_location=ProxyLocation.Disabled)
            serve.run(build(config, engine=StandIn), name="segcore", route_prefix="/")
        else:
            serve.start(
                http_options=HTTPOptions(host="127.0.0.1", port=_port()),
                grpc_options=gRPCOptions(port=config.grpc_port, grpc_servicer_functions=servicer_functions()),
            )
            serve.run(build(config, engine=StandIn, ingress=Ingress, quick={}), name="segcore", route_prefix="/")
        return asyncio.run(measure(config.grpc_port, certificate[0]))
    finally:
        serve.shutdown()
        ray.shutdown()


async def measure(port: int, certificate: Path | None = None) -> dict[str, float]:
    """What a service on a port of this machine takes, over TLS if there is a certificate."""
    async with _channel(port, certificate) as channel:
        await asyncio.wait_for(channel.channel_ready(), 30)
        return await measured(channel)


def _channel(port: int, certificate: Path | None) -> grpc.aio.Channel:
    address = f"127.0.0.1:{port}"
    if certificate is None:
        return grpc.aio.insecure_channel(address)
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(certificate.read_bytes()))


def _certificate(folder: Path) -> tuple[Path, Path]:
    made = folder / "front.pem", folder / "front.key"
    of = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command = ["openssl", "req", "-x509", "-nodes", "-days", "1", *kind, *of, "-out", made[0], "-keyout", made[1]]
    subprocess.run(command, check=True, capture_output=True)
    return made


async def _serve_bare(port: int) -> None:
    server = grpc.aio.server()
    stubs.add_SessionServiceServicer_to_server(Bare(), server)
    stubs.add_GenerationServiceServicer_to_server(Bare(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def figures_of(results: dict[str, dict[str, float]]) -> list[Figure]:
    units = {"unary_ms": "ms", "first_message_ms": "ms", "message_ms": "ms", "calls_per_s": "1/s"}
    made: list[Figure] = []
    for mode, values in results.items():
        for name, value in values.items():
            target = f"<= {1.5 * BEST_MS:.3f}" if (mode, name) == ("front", "message_ms") else None
            made.append((f"{mode}_{name}", value, units[name], target, MODES[mode][0]))
    best = min(results[mode]["message_ms"] for mode in ("proxy", "haproxy"))
    ratio = results["front"]["message_ms"] / best
    made.append(("front_message_to_best_of_serve", ratio, "ratio", "<= 1.5", "the quicker of Serve's own ways in"))
    return made


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["serve-bare"]:
        asyncio.run(_serve_bare(int(arguments[1])))
    elif arguments[:1] == ["one"]:
        print(json.dumps(run(arguments[1])))
    else:
        results = {}
        for mode in arguments or MODES:
            command = [sys.executable, "-m", "benchmarks.front", "one", mode]
            environment = os.environ | MODES[mode][1] | {"RAY_raylet_start_wait_time_s": "120"}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            if done.returncode:
                print(f"{mode}: failed\n{done.stderr[-3000:]}", file=sys.stderr)
                continue
            results[mode] = json.loads(done.stdout.strip().splitlines()[-1])
            print(mode, {name: round(value, 3) for name, value in results[mode].items()}, flush=True)
        if results.keys() == MODES.keys():
            _keep(records(COMMAND, figures_of(results), ("ray", "grpcio")))


def _keep(made: list[dict[str, Any]]) -> None:
    """Put the records in the place of this command's earlier ones."""
    file = RESULTS / "serving.json"
    others = json.loads(file.read_text()) if file.exists() else []
    write("serving", [record for record in others if record["command"] != COMMAND] + made)


if __name__ == "__main__":
    main(sys.argv[1:])
