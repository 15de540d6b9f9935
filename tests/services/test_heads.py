"""`segcore heads` from end to end on a tiny model, and what it draws and prints."""

import json
import math
import shutil

import pytest

from segcore.heads.report import HeadsReport
from services.cli import main
from services.heads import rank_correlation
from services.serving.config import ServeConfig


@pytest.fixture(scope="module")
def longer_model(model_directory, tmp_path_factory):
    """The tiny model with positions enough for facts in a byte tokenizer's tokens."""
    folder = tmp_path_factory.mktemp("models") / "longer"
    shutil.copytree(model_directory, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return folder


@pytest.mark.slow
def test_the_command_writes_a_report_and_a_picture_that_the_engine_takes(longer_model, tmp_path, capsys):
    made = tmp_path / "made" / "here" / "longer.json"
    arguments = ["--lengths", "900", "--depths", "0.2", "0.8", "--rounds", "1", "--selectors", "3", "--seed", "5"]
    assert main(["heads", str(longer_model), "--output", str(made.parent), *arguments]) == 0
    report = HeadsReport.read(made)
    assert (report.lengths, report.depths, report.rounds, report.seed) == ((900,), (0.2, 0.8), 1, 5)
    assert report.questions == 8
    assert 1 <= len(report.selectors) <= 3
    assert len(report.reciprocal_rank) == 2
    assert made.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(made) in capsys.readouterr().out

    config = ServeConfig(model=str(longer_model), heads=made)
    assert config.segment_config().selectors == report.selectors


@pytest.mark.slow
def test_another_text_can_be_the_haystack(longer_model, tmp_path):
    text = tmp_path / "essay.txt"
    text.write_text("".join(f"Day {i} brought nothing new. " for i in range(100)))
    arguments = ["--output", str(tmp_path), "--text", str(text), "--lengths", "900", "--depths", "0.5", "--rounds", "1"]
    assert main(["heads", str(longer_model), *arguments]) == 0
    assert HeadsReport.read(tmp_path / "longer.json").haystack == "essay.txt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "7168"], "2048 positions: take shorter lengths than 7168"),
        (["--lengths", "600"], "leaves no room"),
        (["--depths", "2"], "between 0 and 1"),
        (["--rounds", "0"], "at least one"),
        (["--selectors", "0"], "take at least 1"),
        (["--text", "nowhere.txt"], "nowhere.txt isn't a readable UTF-8 text"),
    ],
)
def test_arguments_that_cannot_work_are_named(longer_model, tmp_path, capsys, arguments, message):
    assert main(["heads", str(longer_model), "--output", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("a", "b", "correlation"),
    [
        (((1.0, 2.0), (3.0, 9.0)), ((0.1, 0.2), (0.3, 0.4)), 1.0),
        (((1.0, 2.0), (3.0, 9.0)), ((4.0, 3.0), (2.0, 1.0)), -1.0),
        (((1.0, 2.0), (3.0, 4.0)), ((0.0, 0.0), (0.0, 1.0)), 0.7745966692414834),  # ranks 2, 2, 2, 4
        (((1.0, 2.0), (3.0, 4.0)), ((0.0, 0.0), (0.5, 9.0)), 0.9486832980505138),  # ranks 1.5, 1.5, 3, 4
    ],
)
def test_rank_correlation(a, b, correlation):
    assert rank_correlation(a, b) == pytest.approx(correlation)


def test_rank_correlation_of_a_constant_is_undefined():
    assert math.isnan(rank_correlation(((1.0, 1.0),), ((1.0, 2.0),)))
