"""A real API server on this machine, with an etcd of its own: no node, no operator."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import yaml

from tests.cluster.conftest import ROOT, tool
from tests.services.cluster import free_port

ASSETS = "KUBEBUILDER_ASSETS"
TOKEN = "administrator"
START_S = 120


class ApiServer:
    """kubectl's words, by which an administrator speaks to it."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self._kubectl = [
            tool("kubectl"), f"--server={url}", f"--token={TOKEN}", "--insecure-skip-tls-verify",
            f"--cache-dir={folder / 'kubectl'}", "--kubeconfig=/dev/null",
        ]  # fmt: skip
        self.minor = int("".join(filter(str.isdigit, self.get("/version")["minor"])))

    def get(self, path: str) -> dict[str, Any]:
        return json.loads(self.kubectl("get", "--raw", path))

    def kubectl(self, *words: str, sent: object = None, fails: bool = False) -> str:
        """What kubectl printed, or said of its failure; `sent` are objects for its standard input."""
        given = None if sent is None else json.dumps(sent)
        done = subprocess.run([*self._kubectl, *words], input=given, capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    def create(self, objects: list[dict], namespace: str, *words: str, fails: bool = False) -> str:
        """Unknown fields are errors, the server's own or, where it is old, kubectl's by the server's schemas."""
        things = {"apiVersion": "v1", "kind": "List", "items": [self._known(thing) for thing in objects]}
        return self.kubectl("create", "-n", namespace, "--validate=strict", "-f", "-", *words, sent=things, fails=fails)

    def define(self, folder: Path) -> None:
        """Take up the custom resource definitions of a folder."""
        for file in sorted(folder.glob("*.yaml")):
            definition = yaml.load(file.read_text(), yaml.CSafeLoader)
            if self.minor < 25:
                definition = without_empty_defaults(definition)
            self.kubectl("create", "--validate=false", "-f", "-", sent=definition)
        self.kubectl("wait", "crd", "--all", "--for=condition=Established", f"--timeout={START_S}s")

    def _known(self, thing: dict) -> dict:
        if self.minor < 21 and thing["apiVersion"] == "policy/v1":  # a budget's fields are the same in both
            return thing | {"apiVersion": "policy/v1beta1"}
        return thing


def without_empty_defaults(schema: Any) -> Any:
    """A definition for servers before 1.25, which refuse the default "" of a part of a list's key."""
    if isinstance(schema, list):
        return [without_empty_defaults(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: without_empty_defaults(value) for name, value in schema.items() if (name, value) != ("default", "")}
    keys, item = made.get("x-kubernetes-list-map-keys"), made.get("items", {})
    if keys is not None:
        sure = {*item.get("required", ()), *(n for n, p in item.get("properties", {}).items() if "default" in p)}
        if not set(keys) <= sure:
            del made["x-kubernetes-list-map-keys"]
            made["x-kubernetes-list-type"] = "atomic"
    return made


@contextlib.contextmanager
def open_api_server(assets: Path, folder: Path) -> Iterator[ApiServer]:
    """etcd and kube-apiserver of a folder, as envtest has them; they listen to this machine alone."""
    client, peer, port = (free_port() for _ in "123")
    (folder / "tokens.csv").write_text(f"{TOKEN},{TOKEN},{TOKEN},system:masters\n")
    key = folder / "service-account.key"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    store, url = f"http://127.0.0.1:{client}", f"https://127.0.0.1:{port}"
    etcd = [
        str(assets / "etcd"), f"--data-dir={folder / 'etcd'}", f"--listen-client-urls={store}",
        f"--advertise-client-urls={store}", f"--listen-peer-urls=http://127.0.0.1:{peer}",
        "--max-request-bytes=8000000",  # KubeRay's definitions are large
    ]  # fmt: skip
    server = [
        str(assets / "kube-apiserver"), f"--etcd-servers={store}", "--bind-address=127.0.0.1", f"--secure-port={port}",
        f"--cert-dir={folder / 'certificates'}", f"--token-auth-file={folder / 'tokens.csv'}",
        "--authorization-mode=Node,RBAC", "--service-cluster-ip-range=10.0.0.0/24", "--allow-privileged=true",
        f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}",
        f"--service-account-issuer={url}", "--disable-admission-plugins=ServiceAccount",
    ]  # fmt: skip
    if "v1.20." in subprocess.run([server[0], "--version"], capture_output=True, text=True).stdout:
        server.append("--feature-gates=GenericEphemeralVolume=true,TTLAfterFinished=true")  # as from 1.23 on
    with contextlib.ExitStack() as started:
        for command in (etcd, server):
            started.enter_context(process(command, folder / f"{Path(command[0]).name}.log"))
        wait_until_ready(url, folder / "kube-apiserver.log")
        yield ApiServer(url, folder)


@contextlib.contextmanager
def process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that is ended at the end, and whose words go to a file."""
    with open(log, "wb") as written:
        started = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT)
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def wait_until_ready(url: str, log: Path) -> None:
    until = time.monotonic() + START_S
    with requests.Session() as http:
        http.trust_env, http.verify = False, False
        while True:
            with contextlib.suppress(requests.RequestException):
                if http.get(f"{url}/readyz", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=5).ok:
                    return
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.2)
