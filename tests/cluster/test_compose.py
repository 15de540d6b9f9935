"""docker-compose.yml by compose's own schema and by what it should hold to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import ROOT, run, tool

FILE = ROOT / "docker-compose.yml"
NODES = {"head", "front", "engine-1", "engine-2", "gpu-1", "gpu-2"}


def config(*arguments: str, fails: bool = False, file: Path = FILE) -> str:
    profiles = [word for name in ("cpu", "gpu") for word in ("--profile", name)]
    where = ("--project-directory", str(ROOT), "-f", str(file))
    return run(tool("compose"), *where, *profiles, "config", *arguments, fails=fails)


@pytest.fixture(scope="module")
def services() -> dict[str, dict]:
    return json.loads(config("--format", "json"))["services"]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("mem_limit:", "mem_limitt:"),
        ("{redis: {condition", "{rediss: {condition"),
        ("secrets: [ray_token]", "secrets: [ray_tokens]"),
    ],
    ids=["misspelt", "a service that isn't there", "a secret that isn't there"],
)
def test_a_fault_is_found(tmp_path, right, wrong):
    text = FILE.read_text()
    assert right in text
    file = tmp_path / "compose.yml"
    file.write_text(text.replace(right, wrong))
    assert config("--quiet", fails=True, file=file)


def test_containers_write_beside_no_volume_and_have_no_rights(services):
    assert services.keys() > NODES
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name


def test_only_the_front_may_be_reached_from_elsewhere(services):
    for name, service in services.items():
        for port in service.get("ports", []):
            assert name == "front" or port["host_ip"] == "127.0.0.1"


def test_secrets_are_files(services):
    text = FILE.read_text()
    assert all("file" in secret for secret in yaml.safe_load(text)["secrets"].values())
    for service in services.values():
        for name in service.get("environment") or {}:
            assert not any(word in name for word in ("PASSWORD", "TOKEN", "SECRET")) or name.endswith(("FILE", "PATH"))


def test_each_profile_has_two_engines_with_files_of_their_own(services):
    for profile in ("cpu", "gpu"):
        engines = [each for each in services.values() if each.get("profiles") == [profile]]
        assert len(engines) == 2
        assert len({each["volumes"][0]["source"] for each in engines}) == 2
        assert all(json.loads(each["command"][-1].partition("=")[2]) == {"engine": 1} for each in engines)


def test_files_that_the_application_names_are_mounted(services):
    (application,) = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())["applications"]
    named = {value for value in application["args"].values() if str(value).startswith("/etc/")}
    assert named == {
        secret["target"] for secret in services["front"]["secrets"] if secret["target"].startswith("/etc/")
    }
    password = application["args"]["redis_password"]
    assert all(password in [secret["target"] for secret in services[node]["secrets"]] for node in NODES)


def test_grafana_finds_the_dashboard_and_prometheus(services):
    mounts = {mount["target"]: Path(mount["source"]) for mount in services["grafana"]["volumes"]}
    provisioning = mounts["/etc/grafana/provisioning"]
    (provider,) = read(provisioning / "dashboards" / "segcore.yaml")["providers"]
    (source,) = read(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    folder = mounts[provider["options"]["path"]]
    (dashboard,) = (json.loads(file.read_text()) for file in folder.rglob("*.json"))
    assert source["url"] == f"http://prometheus:{services['prometheus']['ports'][0]['target']}"
    (variable,) = (each for each in dashboard["templating"]["list"] if each["type"] == "datasource")
    assert variable["query"] == source["type"]
    panels = [panel for panel in dashboard["panels"] if "targets" in panel]
    assert {panel["datasource"]["uid"] for panel in panels} == {f"${{{variable['name']}}}"}


def read(file: Path) -> dict:
    return yaml.safe_load(file.read_text())
