"""What checks the cluster's files: tools that `scripts/cluster-tools` installs, and KubeRay's own definitions."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "cluster" / "kuberay"
CRDS = "KUBERAY_CRDS"


def tool(name: str) -> str:
    """A program's path; skips the test where there is none."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}: scripts/cluster-tools installs it")
    return found


def run(*command: str, fails: bool = False) -> str:
    """What a command printed, or said of its failure."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="session")
def render() -> Callable[..., list[dict]]:
    """The chart's objects with some options of `helm template`."""
    helm = tool("helm")

    @functools.cache
    def objects(*options: str) -> list[dict]:
        text = run(helm, "template", "x", str(CHART), *options)
        return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each is not None]

    return objects


@pytest.fixture(scope="session")
def crds() -> Path:
    """The folder of KubeRay's custom resource definitions."""
    folder = os.environ.get(CRDS)
    if folder is None or not Path(folder).is_dir():
        pytest.skip(f"needs ${CRDS}: the folder helm-chart/kuberay-operator/crds of ray-project/kuberay, v1.6 or later")
    return Path(folder)
