"""An adapter through the service's configuration, its command and its engine."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest
import torch

import segcore
from segcore.config import DuoConfig
from segcore.errors import ConfigError, NotFound, Unavailable
from segcore.presets import SHIPPED_ADAPTERS
from segcore.sampling import SamplingParams
from segcore.training.lora import add_lora, save_adapter
from services.cli import _config, _parser, main
from services.evaluation.config import ArmSection
from services.serving.config import ServeConfig
from services.serving.engine_deployment import EngineDeployment
from services.serving.local import cause
from tests.conftest import tiny_model, tiny_segment

TRAINED = tiny_segment(retrieved_tokens=4)


@pytest.fixture(scope="module")
def adapter(model_directory, tmp_path_factory) -> Path:
    """Of the tiny model; it does something."""
    lm = segcore.load_model(str(model_directory), dtype="float32", device="cpu", trainable=True).lm
    add_lora(lm)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(lm, folder, base_model=str(model_directory), segment=TRAINED)
    return folder


def test_an_adapters_policy_is_the_preset(adapter):
    assert ServeConfig(adapter=adapter).segment_config() == TRAINED
    changed = ServeConfig(adapter=adapter, segment={"retrieved_tokens": 8}).segment_config()
    assert changed == tiny_segment(retrieved_tokens=8)
    duo = ServeConfig(adapter=adapter, segment={"policy": "duo", "retrieval": ((0, 0),)}).segment_config()
    assert duo == DuoConfig(retrieval=((0, 0),))  # type: ignore[arg-type]


@pytest.mark.parametrize("command", [["serve"], ["ask", "text.txt", "Why?"]])
def test_commands_take_an_adapter(adapter, command):
    config = _config(_parser().parse_args([*command, "--adapter", str(adapter)]))
    assert config.adapter == adapter
    assert config.engine_config().segment == TRAINED


def test_a_model_is_served_with_the_adapter_that_is_shipped_for_it(model_directory, adapter, monkeypatch):
    """Unless another is named, or none; evaluation has none unless it asks for it."""
    name = str(model_directory)
    plain = ServeConfig(model=name).segment_config()
    monkeypatch.setitem(SHIPPED_ADAPTERS, name, adapter)
    assert ServeConfig(model=name).segment_config() == TRAINED != plain
    for command, segment in ([], TRAINED), (["--adapter", "default"], TRAINED), (["--adapter", "none"], plain):
        assert _config(_parser().parse_args(["serve", "--model", name, *command])).segment_config() == segment
    assert ArmSection(name="a").segment_config(name) == plain
    assert ArmSection.model_validate({"name": "a", "adapter": "default"}).segment_config(name) == TRAINED
    found = segcore.load_model(name, device="cpu", adapter="default").adapter
    assert found is not None
    assert found.directory == adapter
    assert segcore.load_model(name, device="cpu", adapter="none").adapter is None
    monkeypatch.delitem(SHIPPED_ADAPTERS, name)
    assert segcore.load_model(name, device="cpu", adapter="default").adapter is None


def test_an_absent_adapter_is_an_error_before_anything_starts(tmp_path, capsys):
    assert main(["serve", "--adapter", str(tmp_path)]) == 1
    assert "has no adapter_config.json" in capsys.readouterr().err
    with pytest.raises(NotFound):
        ServeConfig(adapter=tmp_path).engine_config()


def serve(model: Path, past: Path, **options: object) -> tuple[str, str]:
    """A greedy answer of one engine, and the name of the adapter that its past KV bears."""

    async def ask() -> tuple[str, str]:
        config = ServeConfig(
            model=str(model),
            dtype="float32",
            device="cpu",
            threads=1,
            chunk_tokens=16,
            past_directory=past,
            **({"segment": {"policy": "segmented", **SEGMENT}} | options),  # type: ignore[arg-type]
        )
        engine = EngineDeployment(config)
        try:
            session = uuid.uuid4().hex  # sessions stay where their past KV is
            await engine.create("", session)
            params = SamplingParams(max_tokens=12)
            parts = [part async for part in engine.generate("", session, "What was it that I said?", params)]
            return "".join(part.text for part in parts), engine._engine.fingerprint.adapter
        finally:
            await engine.end()

    return asyncio.run(ask())


SEGMENT = {"segment_tokens": 16, "selectors": ((0, 1), (1, 0)), "retrieved_tokens": 16, "tail_tokens": 16}


def test_the_engine_serves_it(model_directory, adapter, tmp_path):
    plain, no_adapter = serve(model_directory, tmp_path / "a")
    adapted, name = serve(model_directory, tmp_path / "b", adapter=adapter)
    assert adapted != plain
    assert no_adapter == ""
    assert len(name) == 40


def test_an_adapter_of_another_model_is_refused_by_name(adapter, tmp_path, model_directory):
    other = tmp_path / "other"
    lm = segcore.load_model(str(model_directory), dtype="float32", device="cpu")
    lm.tokenizer.tokenizer.save_pretrained(other)
    tiny_model("qwen2", dtype=torch.float32).save_pretrained(other)
    with pytest.raises(ConfigError, match="has other weights: load that model"):
        serve(other, tmp_path / "past", adapter=adapter)


def test_what_kept_replicas_from_starting_is_the_commands_error():
    report = """The deployment failed to start 3 times in a row. Error:
      File "segcore/merging.py", line 49, in check_base
    segcore.errors.ConfigError: adapter 'a' was trained on 'b'"""
    found = cause(report.replace("\n    ", "\n"))
    assert (type(found), found.message) == (ConfigError, "adapter 'a' was trained on 'b'")
    assert isinstance(cause("no node has a GPU"), Unavailable)
    assert "no node has a GPU" in cause("no node has a GPU").message
