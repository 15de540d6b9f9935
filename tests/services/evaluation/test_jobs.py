"""Evaluations as jobs of a Ray cluster: one unbroken; one stopped and gone on with; one that can't be."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from segcore.errors import InvalidRequest, Unavailable
from services.cli import main
from services.evaluation.command import run_eval
from services.evaluation.config import EvalConfig
from services.evaluation.run import RESULTS
from services.evaluation.summary import Summary
from tests.services.cluster import free_port, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def written(tmp_path, values) -> Callable[..., Path]:
    """A configuration as a file, whose text to hide facts in lies beside it."""

    def write(name: str, items: int, **more: object) -> Path:
        file = tmp_path / f"{name}.yaml"
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / "text.md").write_text("".join(f"Sentence {i} says little. " for i in range(3000)))
        task = {"task": "needle", "lengths": [400], "items": items, "max_tokens": 2, "forms": ["diary"]}
        made = values(Path("runs"), name=name, tasks=[task], haystack="texts/text.md", haystack_part="all")
        file.write_text(yaml.safe_dump(made | more))
        return file

    return write


def test_a_job_that_was_stopped_goes_on_to_its_report(cluster, written, capsys):
    file, address = written("run", 12), cluster.address
    config = EvalConfig.read(file)
    results = config.folder / RESULTS
    assert config.storage == file.parent / "runs"

    assert main(["eval", str(file), "--address", address, "--detach"]) == 0
    job = re.search(r"submitted (\S+)", capsys.readouterr().out)[1]
    wait_for(lambda: results.exists() and results.read_text().count("\n") >= 2)
    assert main(["eval", "stop", job, "--address", address]) == 0
    before = results.read_text()
    assert before.count("\n") < 24
    assert main(["eval", "list", "--address", address]) == 0
    assert re.search(rf"{config.run_id}.*STOPPED", capsys.readouterr().out)

    assert main(["eval", str(file), "--address", address]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert str(config.folder / "report.html") in shown
    assert "24 planned, 24 scored, 0 failed, 0 left" in shown
    assert results.read_text().startswith(before[: before.rindex("\n") + 1])
    assert Summary.read(config.folder).counts == {"planned": 24, "scored": 24, "failed": 0, "left": 0}

    text = file.parent / "texts" / "text.md"
    text.write_text(text.read_text() + "One more sentence. ")
    assert main(["eval", str(file), "--address", address]) == 1
    assert "the data of needle have changed" in " ".join(capsys.readouterr().out.split())


def test_where_nobody_takes_jobs_is_said(written):
    gone = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Unavailable, match="no Ray cluster takes jobs"):
        run_eval([str(written("x", 1))], gone, detach=False)
    with pytest.raises(InvalidRequest, match="--detach is for jobs"):
        run_eval([str(written("x", 1))], None, detach=True)
