"""Faults of configuration files are told with their lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from segcore.config import FullConfig, LagKVConfig
from segcore.errors import ConfigError
from segcore.presets import segment_preset, write_card
from segcore.weights import DTYPES
from services.training.config import TrainConfig


def line_of(file, text):
    return next(i for i, line in enumerate(file.read_text().splitlines(), 1) if text in line)


def fault(file):
    with pytest.raises(ConfigError) as raised:
        TrainConfig.read(file)
    return raised.value.message


def without(file, *keys):
    """The file again, with some keys taken out."""
    values = {key: value for key, value in yaml.safe_load(file.read_text()).items() if key not in keys}
    other = file.with_name(f"without-{'-'.join(keys)}.yaml")
    other.write_text(yaml.safe_dump(values))
    return other


def test_every_fault_has_its_line(written):
    file = written(steps=0, optimiser={"learning_rate": 1}, workers={"count": [3, 1]}, k="some")
    text = fault(file)
    assert f"{file}:{line_of(file, 'steps: 0')}: steps: Input should be greater than or equal to 1" in text
    assert f"{file}:{line_of(file, 'optimiser')}: optimiser: there is no such key" in text
    assert f"{file}:{line_of(file, 'workers:')}: workers: count must be a number of at least 1" in text
    assert f"{file}:{line_of(file, 'k: some')}: k" in text


def test_a_fault_in_a_section_has_the_line_of_its_key(written):
    file = written(optimizer={"learning_rate": 0.1, "betas": [0.9, "x"]})
    assert f"{file}:{line_of(file, '- x')}: optimizer.betas.1" in fault(file)


def test_a_missing_key_and_a_key_that_is_there_twice(written):
    file = without(written(), "steps")
    assert f"{file}:1: steps: Field required" in fault(file)
    file.write_text("name: a\nsteps: 3\noptimizer:\n  eps: 1\n  eps: 2\n")
    assert fault(file) == f"{file}:5: eps: the key is there twice"
    file.write_text("name: a\nsteps: [3\n")
    assert fault(file).startswith(f"{file}:3: ")
    file.write_text("name: &a [*a]\n")
    assert "a part of it holds itself" in fault(file)
    with pytest.raises(ConfigError, match="isn't a readable configuration"):
        TrainConfig.read(file.with_name("none.yaml"))


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ({"policy": "sparse"}, "unknown policy 'sparse'"),
        ({"policy": "full", "tail_tokens": 3}, "has no option tail_tokens"),
        ("paper", "names heads of Llama-2-7B"),
        ("none.json", "doesn't say under which policy"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_before_the_run(written, segment, message):
    file = written(segment=segment)
    text = fault(file)
    assert message in text
    assert text.startswith(f"{file}:{line_of(file, 'segment:')}: segment: ")


@pytest.mark.parametrize(
    ("changes", "line", "message"),
    [
        ({"optimizer": {"betas": [0.9, 1.5]}}, "- 1.5", "optimizer.betas.1: Input should be less than 1"),
        ({"dtype": "int8"}, "dtype:", "dtype: Input should be 'auto', "),
        ({"workers": {"count": [1, 9]}}, "workers:", "workers: 9 workers would share data.streams_per_step=4"),
        ({"freeze": True}, "freeze:", "freeze: nothing would be trained"),
        ({"segment": {"policy": "full"}, "selectors": {}}, "selectors: {}", "selectors: they learn under policy"),
        ({"adapter": "here"}, "adapter:", "adapter: it is trained further with lora, or kept with freeze"),
        ({"gates": {}, "lora": {}}, "gates:", "gates: they are trained alone"),
        ({"gates": {}, "freeze": False}, "gates:", "gates: they are of policy duo"),
    ],
)
def test_what_cannot_go_together_is_refused_before_the_run(written, changes, line, message):
    file = written(**changes)
    assert f"{file}:{line_of(file, line)}: {message}" in fault(file)


def test_what_the_model_itself_says_is_for_an_adapter_to_learn(written):
    data = {"sources": [{"tasks": [{"task": "needle"}], "loss": "own"}]}
    assert 'loss "own" is of an adapter' in fault(written(data=data, evaluation=None))
    assert TrainConfig.read(written(data=data | {"streams_per_step": 4}, evaluation=None, lora={})).lora is not None


def test_every_dtype_that_a_model_can_have_can_be_named(written):
    for name in ("auto", *DTYPES):
        assert TrainConfig.read(written(dtype=name)).dtype == name


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[3] / "examples").glob("train-*.yaml")), ids=lambda f: f.name
)
def test_shipped_configurations_can_be_read(file):
    assert TrainConfig.read(file).steps


def test_segments_are_named_as_serving_names_them(written, tmp_path):
    assert TrainConfig.read(written(segment={"policy": "full"})).segment_config() == FullConfig()
    preset = TrainConfig.read(written(model="smollm2-135m-instruct", segment="default")).segment_config()
    assert preset == segment_preset("smollm2-135m-instruct")
    config = LagKVConfig(lag_tokens=64, keep=0.25)
    file = written(segment="segcore.json")
    write_card(tmp_path, config)
    assert TrainConfig.read(file).segment_config() == config


def test_evaluation_may_run_another_policy(written):
    """The mismatch that is a control: trained under full attention, run in segments."""
    plain = yaml.safe_load(written().read_text())
    other = plain["evaluation"] | {"segment": plain["segment"]}
    config = TrainConfig.read(written(segment={"policy": "full"}, evaluation=other))
    assert config.segment_config().policy == "full"
    assert config.evaluation_segment().policy == "segmented"


def test_paths_are_relative_to_the_file_and_survive_the_way_to_a_job(written, tmp_path):
    file = written(storage="here", name="a")
    assert TrainConfig.read(without(file, "storage")).storage == tmp_path / "runs"
    config = TrainConfig.read(file)
    assert config.folder == tmp_path / "here" / "a"
    again = TrainConfig.model_validate_json(config.to_json())
    assert again == config
    assert again.digest == config.digest


def test_the_hash_is_of_what_the_curve_depends_on(written):
    config = TrainConfig.read(written())
    free = TrainConfig.read(written(workers={"count": 2}, checkpoints={"every": 7}, name="other"))
    assert free.digest == config.digest
    assert TrainConfig.read(written(seed=1)).digest != config.digest
    json.dumps(config.digests)
