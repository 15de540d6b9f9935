"""The arrows of the architecture, read off the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for top in ("segcore", "services") for p in (ROOT / top).rglob("*.py"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


IMPORTS = {path: imports(path) for path in SOURCES}


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in IMPORTS[path]}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "segcore")], ids=name_of)
def test_the_engine_knows_no_service(path):
    assert not tops(path) & {"services", "protos", "ray", "grpc", "google", "pydantic", "rich"}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "services")], ids=name_of)
def test_a_service_never_imports_another(path):
    own = path.relative_to(ROOT / "services").parts[0]
    others = {p.name for p in (ROOT / "services").iterdir() if p.is_dir() and p.name not in (own, "__pycache__")}
    used = {name.split(".")[1] for name in IMPORTS[path] if name.startswith("services.") and name.count(".") >= 1}
    if (ROOT / "services" / own).is_dir():
        assert not used & others


def test_generated_code_is_touched_by_few():
    users = {name_of(p) for p in SOURCES if any(n.startswith("protos") for n in IMPORTS[p])}
    assert {user for user in users if not user.startswith("services/serving/client/")} == {
        "services/serving/codec.py",
        "services/serving/ingress.py",
    }


def test_ray_is_named_by_few():
    users = {name_of(p) for p in SOURCES if "ray" in tops(p)}
    assert users == {
        "services/evaluation/run.py",
        "services/jobs.py",
        "services/local_ray.py",
        "services/serving/app.py",
        "services/serving/autoscaling.py",
        "services/serving/engines.py",
        "services/serving/gate.py",
        "services/serving/ingress.py",
        "services/serving/local.py",
        "services/serving/metrics.py",
        "services/training/train.py",
    }


def test_tasks_are_pure_python():
    """Generators of text know no tokens and no tensors: they run wherever a configuration is checked."""
    allowed = {"segcore", "__future__"} | set(sys.stdlib_module_names)
    for path in SOURCES:
        if path.is_relative_to(ROOT / "segcore" / "tasks"):
            assert tops(path) <= allowed, path
            inside = {name for name in IMPORTS[path] if name.startswith("segcore.")}
            assert all(name.startswith(("segcore.tasks", "segcore.errors")) for name in inside), path


def run_without(blocked: set[str], code: str) -> str:
    """Run code in a new interpreter in which some packages can't be imported."""
    guard = (
        "import sys\n"
        "class Guard:\n"
        f"    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked!r}: raise ImportError(name + ' is blocked')\n"
        "sys.meta_path.insert(0, Guard())\n"
    )
    done = subprocess.run([sys.executable, "-c", guard + code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_engine_imports_with_its_own_dependencies_alone():
    modules = [name_of(p)[:-3].replace("/", ".").removesuffix(".__init__") for p in SOURCES]
    engine = [m for m in modules if m.startswith("segcore")]
    code = f"import importlib\nfor m in {engine!r}: importlib.import_module(m)\nimport segcore; segcore.Engine"
    run_without({"ray", "grpc", "redis", "services", "protos"}, code)


def test_a_client_needs_no_torch():
    run_without({"torch", "transformers", "ray"}, "import services.serving.client, services.cli, services.ask")


def test_who_submits_a_training_run_needs_no_torch():
    run_without({"torch", "transformers"}, "import services.training.commands, services.training.train")


def test_the_engines_public_names_are_there():
    import segcore

    assert all(getattr(segcore, name) is not None for name in segcore.__all__)
    assert sorted(segcore._HOME) == sorted(segcore.__all__)
