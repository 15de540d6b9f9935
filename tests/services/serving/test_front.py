"""The front: TLS, health, tokens, limits, and what happens to calls that are given up."""

from __future__ import annotations

import asyncio
import datetime
import inspect
import ipaddress
import json
import shutil
import ssl
import time
import urllib.error
import urllib.request

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from benchmarks import front as benchmark
from protos.gen.segcore.v1 import segcore_pb2 as pb
from protos.gen.segcore.v1 import segcore_pb2_grpc as stubs
from segcore.errors import Busy, ConfigError, Unauthenticated
from services.serving.client import Client
from services.serving.config import ServeConfig
from services.serving.ingress import Ingress
from services.serving.tenants import token_hash
from services.serving.tls import Certificate
from tests.services.serving.fronts import RunningFront


class Authority:
    """A certificate authority of a test's own."""

    def __init__(self, folder):
        self._folder, self._key, self._name = folder, ec.generate_private_key(ec.SECP256R1()), _name("test authority")
        self._number = 0
        made = self._build(self._name, self._key, x509.BasicConstraints(ca=True, path_length=None))
        self.file = folder / "ca.pem"
        self.file.write_bytes(made.public_bytes(serialization.Encoding.PEM))

    def issue(self, name):
        """A certificate's file and its key's."""
        key = ec.generate_private_key(ec.SECP256R1())
        local = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        self._number += 1
        files = self._folder / f"{self._number}.pem", self._folder / f"{self._number}.key"
        files[0].write_bytes(self._build(_name(name), key, local).public_bytes(serialization.Encoding.PEM))
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        files[1].write_bytes(key.private_bytes(*form))
        return files

    def _build(self, subject, key, extension):
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        return builder.add_extension(extension, critical=False).sign(self._key, hashes.SHA256())


def _name(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def plain(front):
    return front(grpc_reflection=True)


def get(url, context=None):
    with urllib.request.urlopen(url, timeout=20, context=context) as response:
        return json.loads(response.read())


def refused(request):
    """Status, headers and body of an error."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=20)
    with caught.value as error:
        return error.code, error.headers, error.read()


def secure(front, authority, client=None):
    """A gRPC channel over TLS, with a client's certificate or none."""
    chain, key = (None, None) if client is None else (client[0].read_bytes(), client[1].read_bytes())
    credentials = grpc.ssl_channel_credentials(authority.file.read_bytes(), key, chain)
    return grpc.secure_channel(front.grpc, credentials)


def info(channel, timeout=20, **more):
    return stubs.InfoServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout, **more)


def test_both_faces_speak_tls_and_only_tls(front, authority):
    certificate, key = authority.issue("front")
    one = front(tls_certificate=certificate, tls_key=key)
    with secure(one, authority) as channel:
        model = info(channel).model
    context = ssl.create_default_context(cafile=authority.file)
    assert get(f"{one.http}/v1/models", context=context)["data"][0]["id"] == model
    with grpc.insecure_channel(one.grpc) as channel, pytest.raises(grpc.RpcError):
        info(channel)
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        get(f"{one.http}/v1/models")


def test_with_a_client_authority_strangers_are_turned_away(front, authority, tmp_path):
    certificate, key = authority.issue("front")
    one = front(tls_certificate=certificate, tls_key=key, tls_client_ca=authority.file)
    own, stranger = authority.issue("client"), Authority(tmp_path).issue("client")
    with secure(one, authority, own) as channel:
        assert info(channel).model
    for other in (None, stranger):
        with secure(one, authority, other) as channel, pytest.raises(grpc.RpcError) as caught:
            info(channel)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    context = ssl.create_default_context(cafile=authority.file)
    with pytest.raises(OSError, match=r"(?i)certificate|reset|closed|broken pipe"):
        get(f"{one.http}/v1/models", context=context)
    context.load_cert_chain(*own)
    assert get(f"{one.http}/v1/models", context=context)["data"]


def test_the_client_speaks_tls_and_shows_token_and_certificate(front, authority, tmp_path):
    certificate, key = authority.issue("front")
    tenants = tmp_path / "tenants.json"
    tenants.write_text(json.dumps({"tenants": [{"name": "t", "tokens": [token_hash("t")], "sessions": 1}]}))
    one = front(tls_certificate=certificate, tls_key=key, tls_client_ca=authority.file, tenants=tenants)
    own = authority.issue("client")
    with Client(one.grpc, token="t", ca=authority.file, certificate=own) as client:
        session = client.create_session().session_id
        client.upload(session, "A text.")
        assert client.server_info().model
        assert [info.session_id for info in client.list_sessions()] == [session]
        with pytest.raises(Busy, match="all 1 sessions"):
            client.create_session()
        client.delete_session(session)
    with Client(one.grpc, token="u", ca=authority.file, certificate=own) as client, pytest.raises(Unauthenticated):
        client.create_session()


def test_a_renewed_certificate_is_taken_up(front, authority, tmp_path):
    files = tmp_path / "front.pem", tmp_path / "front.key"
    for new, file in zip(authority.issue("front"), files, strict=True):
        shutil.copy(new, file)
    one = front(tls_certificate=files[0], tls_key=files[1])
    before = ssl.get_server_certificate(("127.0.0.1", one.config.grpc_port))
    for new, file in zip(authority.issue("front"), files, strict=True):
        shutil.copy(new, file)
    assert ssl.get_server_certificate(("127.0.0.1", one.config.grpc_port)) != before
    one.listener._certificate.renew()  # what the watcher does every few seconds
    new = ssl.PEM_cert_to_DER_cert(files[0].read_text())
    assert ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", one.config.http_port))) == new
    files[1].write_text("damaged")
    one.listener._certificate.renew()
    assert ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", one.config.http_port))) == new


def test_a_certificate_that_cannot_work_is_refused_at_once(authority, tmp_path):
    with pytest.raises(ValueError, match="go together"):
        ServeConfig(tls_certificate=authority.file)
    with pytest.raises(ConfigError, match=r"absent\.key"):
        Certificate(authority.file, tmp_path / "absent.key", None)
    with pytest.raises(ConfigError, match="TLS"):
        Certificate(authority.file, authority.issue("x")[1], None)  # another key


def test_health_says_what_engines_say(plain, engine, monkeypatch):
    with grpc.insecure_channel(plain.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def status(service=""):
            return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status

        assert status() == health_pb2.HealthCheckResponse.SERVING
        assert status("segcore.v1.GenerationService") == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            status("no.such.Service")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND

        async def broken():
            raise RuntimeError("no engine")

        monkeypatch.setattr(engine, "info", broken)
        plain.call(plain.listener.look())
        assert status() == health_pb2.HealthCheckResponse.SERVING  # the front itself lives
        assert status("segcore.v1.GenerationService") == health_pb2.HealthCheckResponse.NOT_SERVING
    status, _, body = refused(urllib.request.Request(f"{plain.http}/healthz"))
    assert status == 500
    assert b"no engine" not in body


def test_reflection_is_there_if_wanted(plain, front):
    with grpc.insecure_channel(plain.grpc) as channel:
        assert "segcore.v1.SessionService" in ProtoReflectionDescriptorDatabase(channel).get_services()
    with grpc.insecure_channel(front().grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        ProtoReflectionDescriptorDatabase(channel).get_services()
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.fixture(scope="module")
def guarded(front, tmp_path_factory):
    """A front for two tenants; one may make three requests a minute, upload 1,000 bytes, and run 20 tokens."""
    tenants = [
        {"name": "acme", "tokens": [token_hash("acme-token"), token_hash("acme-next")]},
        {
            "name": "small",
            "tokens": [token_hash("small-token")],
            "requests_per_minute": 3,
            "bytes_per_minute": 1000,
            "tokens_per_minute": 20,
        },
    ]
    file = tmp_path_factory.mktemp("tenants") / "tenants.json"
    file.write_text(json.dumps({"tenants": tenants}))
    return front(tenants=file)


BAD_TOKENS = [
    None,
    "",
    "Bearer",
    "Bearer ",
    "acme-token",
    "Basic acme-token",
    "Bearer acme-toke",
    "Bearer " + "x" * 600,
]


@pytest.mark.parametrize("authorization", BAD_TOKENS)
def test_nobody_without_a_token_gets_in(guarded, authorization):
    with grpc.insecure_channel(guarded.grpc) as channel:
        metadata = [] if authorization is None else [("authorization", authorization)]
        for call in (
            lambda: info(channel, metadata=metadata),
            lambda: list(
                stubs.GenerationServiceStub(channel).Generate(
                    pb.GenerateRequest(session_id="x"), metadata=metadata, timeout=20
                )
            ),
            lambda: list(stubs.DocumentServiceStub(channel).UploadDocument(iter([]), metadata=metadata, timeout=20)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    request = urllib.request.Request(f"{guarded.http}/v1/models")
    if authorization is not None:
        request.add_header("Authorization", authorization)
    status, _, body = refused(request)
    assert status == 401
    assert json.loads(body)["error"]["type"] == "authentication_error"
    with urllib.request.urlopen(f"{guarded.http}/healthz", timeout=20) as response:
        assert response.status == 200


def test_a_session_is_there_for_its_tenant_alone(guarded):
    def metadata(token):
        return [("authorization", f"Bearer {token}"), ("session_id", "mine")]

    with grpc.insecure_channel(guarded.grpc) as channel:
        sessions = stubs.SessionServiceStub(channel)
        sessions.CreateSession(pb.CreateSessionRequest(session_id="mine"), metadata=metadata("acme-token"), timeout=20)
        request = pb.GetSessionRequest(session_id="mine")
        assert sessions.GetSession(request, metadata=metadata("acme-next"), timeout=20).session.session_id == "mine"
        with pytest.raises(grpc.RpcError) as other:
            sessions.GetSession(request, metadata=metadata("small-token"), timeout=20)
        sessions.DeleteSession(pb.DeleteSessionRequest(session_id="mine"), metadata=metadata("acme-token"), timeout=20)
        with pytest.raises(grpc.RpcError) as absent:
            sessions.GetSession(request, metadata=metadata("acme-token"), timeout=20)
    assert other.value.code() is absent.value.code() is grpc.StatusCode.NOT_FOUND
    assert other.value.details() == absent.value.details()


def test_a_limit_says_when_to_come_again(guarded):
    with grpc.insecure_channel(guarded.grpc) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            [info(channel, metadata=[("authorization", "Bearer small-token")]) for _ in range(5)]
        for _ in range(5):
            info(channel, metadata=[("authorization", "Bearer acme-token")])
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    (trailer,) = [value for key, value in caught.value.trailing_metadata() if key == "grpc-status-details-bin"]
    retry = RetryInfo()
    assert any(detail.Unpack(retry) for detail in Status.FromString(trailer).details)
    assert 0 < retry.retry_delay.ToMilliseconds() <= 21_000
    bearer = {"Authorization": "Bearer small-token"}
    status, headers, _ = refused(urllib.request.Request(f"{guarded.http}/v1/models", headers=bearer))
    assert status == 429
    assert 1 <= int(headers["Retry-After"]) <= 21


def test_at_its_last_session_a_tenant_can_make_a_call_again(front, tmp_path):
    file = tmp_path / "tenants.json"
    file.write_text(json.dumps({"tenants": [{"name": "two", "tokens": [token_hash("two")], "sessions": 2}]}))
    metadata = [("authorization", "Bearer two")]
    with grpc.insecure_channel(front(tenants=file).grpc) as channel:
        sessions = stubs.SessionServiceStub(channel)
        made, forked = (
            [
                call(request, metadata=metadata, timeout=20).session.session_id
                for _ in "12"  # the first one's answer may have been lost
            ]
            for call, request in (
                (sessions.CreateSession, pb.CreateSessionRequest(session_id="one", request_id="c")),
                (sessions.ForkSession, pb.ForkSessionRequest(session_id="one", new_session_id="two", request_id="f")),
            )
        )
        assert (made, forked) == (["one"] * 2, ["two"] * 2)
        with pytest.raises(grpc.RpcError, match="all 2 sessions"):
            sessions.CreateSession(pb.CreateSessionRequest(session_id="three"), metadata=metadata, timeout=20)
        for name in ("one", "two"):
            sessions.DeleteSession(pb.DeleteSessionRequest(session_id=name), metadata=metadata, timeout=20)


def test_an_answer_that_nobody_reads_ends(plain, engine):
    def answering():
        return plain.call(engine.get("", "left")).answering

    with grpc.insecure_channel(plain.grpc) as channel:
        stubs.SessionServiceStub(channel).CreateSession(pb.CreateSessionRequest(session_id="left"), timeout=20)
        for _ in range(5):
            request = pb.GenerateRequest(session_id="left", question="What?")
            request.sampling.max_tokens = 3000
            call = stubs.GenerationServiceStub(channel).Generate(request, timeout=60)
            next(call)
            call.cancel()
            deadline = time.monotonic() + 10
            while answering() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not answering()
        stubs.SessionServiceStub(channel).DeleteSession(pb.DeleteSessionRequest(session_id="left"), timeout=20)


def test_the_benchmark_of_the_ways_in_measures(loop, monkeypatch):
    for name in ("MESSAGES", "ROUNDS", "CALLS"):
        monkeypatch.setattr(benchmark, name, 16)
    config = ServeConfig()
    served = RunningFront(loop, benchmark.StandIn(config), config)
    try:
        figures = asyncio.run(benchmark.measure(served.config.grpc_port))
    finally:
        served.close()
    assert all(value > 0 for value in figures.values())


def test_serve_finds_where_to_give_its_context():
    """Serve's proxy looks for the parameter by name."""
    for name in pb.DESCRIPTOR.services_by_name["SessionService"].methods_by_name:
        assert "grpc_context" in inspect.signature(getattr(Ingress, name)).parameters
