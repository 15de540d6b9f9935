"""LoRA: its gradients, its directory, what reads it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import segcore
from segcore.adapter import CARD, Adapter
from segcore.config import EngineConfig, SegmentConfig, StreamingConfig
from segcore.engine.engine import Engine
from segcore.errors import BlockMismatch, ConfigError, NotFound
from segcore.merging import base_digest, merge_adapter
from segcore.model import CausalLM
from segcore.training.lora import LoraSettings, add_lora, load_adapter, save_adapter
from segcore.training.optimizer import MasterOptimizer
from segcore.training.stream import TrainingStream
from segcore.training.tbptt import SegmentedTrainer
from tests.conftest import tiny_model, tiny_segment
from tests.segcore.test_invariants import MARKS, MATRIX, STREAM
from tests.segcore.unrolled import Serving, assert_same_gradients, gradients_of, trained_model, unrolled

SHORT = TrainingStream("short", STREAM[:58], marks=(21, 37, 48))
LONG = TrainingStream("long", STREAM, marks=MARKS)
# Any number: gradients are divided by it.
VALID = 1000


def with_lora(lm: CausalLM, **settings: Any) -> CausalLM:
    """A model with an adapter that does something: fresh ones change nothing."""
    add_lora(lm, LoraSettings(**({"rank": 3, "alpha": 6} | settings)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_" in name:
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return lm


def served(lm: CausalLM, config: SegmentConfig) -> Tensor:
    """The logits that serving computes of every token of a stream, [T, V]."""
    with torch.inference_mode():
        serving, logits = Serving(lm, config, LONG, 7), []
        while serving.state.length < len(STREAM):
            logits.append(serving.step())
    return torch.cat(logits)


@pytest.mark.parametrize("k", [0, 1, 2, "all"])
@pytest.mark.parametrize("policy", ["segmented", "duo"])
@pytest.mark.parametrize("checkpoint_layers", [False, True])
def test_i7_an_adapters_gradients_are_those_of_the_unrolled_recurrence(policy, k, checkpoint_layers):
    lm = with_lora(trained_model())
    trainer = SegmentedTrainer(lm, MATRIX[policy], k=k, chunk_tokens=16, checkpoint_layers=checkpoint_layers)
    loss = trainer.loss_and_grad(SHORT, VALID)
    ours = gradients_of(lm)
    expected_loss, expected = unrolled(lm, MATRIX[policy], SHORT, k, 16, VALID)
    assert loss.total == pytest.approx(expected_loss, rel=1e-12)
    assert_same_gradients(ours, expected)
    assert len(ours) == 2 * 7 * 2
    assert all("lora_" in name for name in ours)


def test_an_adapter_learns_and_its_base_stays(tmp_path):
    """bf16 weights, an adapter in fp32, which is its own master."""
    lm = CausalLM(tiny_model(dtype=torch.bfloat16))
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    add_lora(lm)
    trainer = SegmentedTrainer(lm, tiny_segment())
    assert {p.dtype for p in trainer.parameters} == {torch.float32}
    optimizer = MasterOptimizer(trainer.parameters, partial(torch.optim.AdamW, lr=1e-2))
    assert all(mine is master for mine, master in zip(trainer.parameters, optimizer.masters, strict=True))
    losses = []
    for _ in range(6):
        losses.append(trainer.loss_and_grad(SHORT, SHORT.valid_tokens).mean)
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    after = {n.replace(".base_layer", ""): p for n, p in lm.model.named_parameters() if "lora_" not in n}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_fresh_adapter_changes_nothing():
    lm, plain = CausalLM(tiny_model()), CausalLM(tiny_model())
    add_lora(lm, LoraSettings(rank=2, modules=("q_proj", "v_proj")))
    assert len([p for p in lm.model.parameters() if p.requires_grad]) == 2 * 2 * 2
    assert torch.equal(served(lm, tiny_segment()), served(plain, tiny_segment()))


@pytest.mark.parametrize(("settings", "message"), [({"rank": 0}, "rank=0"), ({"alpha": 0.0}, "alpha=0.0")])
def test_settings_that_make_no_adapter_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoraSettings(**settings)


def test_a_module_that_the_model_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="nonsense_proj"):
        add_lora(CausalLM(tiny_model()), LoraSettings(modules=("nonsense_proj",)))


# --- The directory ---


@pytest.fixture(scope="module")
def adapter(model_directory, tmp_path_factory) -> Path:
    """Of the tiny model on disk."""
    lm = with_lora(segcore.load_model(str(model_directory), dtype="float32", device="cpu", trainable=True).lm)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(lm, folder, base_model=str(model_directory), segment=tiny_segment())
    return folder


def load(directory: Path, adapter: Path | None = None, dtype: str = "float64") -> segcore.LoadedModel:
    return segcore.load_model(str(directory), dtype=dtype, device="cpu", adapter=adapter)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own code
def test_plain_peft_loads_it_with_the_same_logits(model_directory, adapter):
    base = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float64)
    theirs = PeftModel.from_pretrained(base, str(adapter), autocast_adapter_dtype=False).eval()
    trained = load(model_directory).lm
    load_adapter(trained, adapter)
    merged = load(model_directory, adapter).lm
    tokens = STREAM[None, :40]
    with torch.inference_mode():
        expected = theirs(input_ids=tokens).logits[0]
    streaming = StreamingConfig(segment_tokens=64, window_tokens=0)
    for lm in (trained, merged):
        with torch.inference_mode():
            ours = Serving(lm, streaming, TrainingStream("one", tokens[0]), 64).step()
        # transformers has angles in fp32, ours begin at another position
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    with theirs.disable_adapter(), torch.inference_mode():
        assert (theirs(input_ids=tokens).logits[0] - expected).abs().max() > 0.1


@pytest.mark.parametrize("policy", ["segmented", "lagkv"])
def test_merged_it_serves_what_was_trained(model_directory, adapter, policy):
    trained = load(model_directory).lm
    load_adapter(trained, adapter)
    merged = load(model_directory, adapter).lm
    logits, expected = served(merged, MATRIX[policy]), served(trained, MATRIX[policy])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    assert (served(load(model_directory).lm, MATRIX[policy]) - expected).abs().max() > 0.1


def test_a_loaded_adapter_is_saved_as_it_was(model_directory, adapter, tmp_path):
    again = segcore.load_model(str(model_directory), dtype="float32", device="cpu", trainable=True).lm
    load_adapter(again, adapter)
    saved = save_adapter(again, tmp_path, base_model=str(model_directory), segment=tiny_segment())
    assert saved.id == Adapter.read(adapter).id == Adapter.read(tmp_path).id
    assert saved.base == base_digest(load(model_directory).lm.model)
    assert saved.segment == tiny_segment()


def test_past_kv_of_another_adapter_is_refused(model_directory, adapter, tmp_path, running):
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    change(other, segment=lambda segment: segment | {"tail_tokens": 4})
    engines, snapshots = [], []
    for folder in (None, adapter, other):
        loaded = load(model_directory, folder)
        config = loaded.identified(EngineConfig(segment=tiny_segment(), chunk_tokens=16))
        engines.append(running(Engine(loaded.lm, config)))
        engines[-1].open("s")
        engines[-1].append("s", STREAM[:40].tolist())
        snapshots.append(engines[-1].snapshot("s"))
    with pytest.raises(BlockMismatch, match="adapter, weights"):
        engines[1].restore("t", snapshots[0])
    with pytest.raises(BlockMismatch, match=r"another adapter$"):
        engines[1].restore("t", snapshots[2])
    engines[1].restore("t", snapshots[1])


# --- What is refused ---


def change(folder: Path, **changes: Callable[[Any], Any]) -> None:
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | {name: f(card[name]) for name, f in changes.items()}))


def rewrite(folder: Path, config: dict[str, Any] | None = None, **tensors: Tensor | None) -> None:
    """Change a plain PEFT directory: the card goes."""
    (folder / CARD).unlink()
    kept = load_file(folder / "adapter_model.safetensors") | tensors
    save_file({n: t for n, t in kept.items() if t is not None}, folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))


Q = "base_model.model.model.layers.0.self_attn.q_proj"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "other weights": (lambda f: change(f, base=lambda _: "0" * 40), "has other weights: load that model"),
    "other version": (lambda f: change(f, version=lambda _: 2), "version 2"),
    "no policy": (lambda f: change(f, segment=lambda _: {}), "isn't one of segcore's"),
    "unknown policy": (lambda f: change(f, segment=lambda s: s | {"policy": "odd"}), "unknown policy 'odd'"),
    "changed file": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "damaged or was changed"),
    "no json": (lambda f: (f / CARD).write_text("{"), "isn't readable"),
    "other shape": (
        lambda f: rewrite(f, **{f"{Q}.lora_B.weight": torch.zeros(31, 3)}),
        r"has \[32, 32\]; load its own",
    ),
    "no such layer": (
        lambda f: rewrite(f, **{f"{Q}x.lora_A.weight": torch.zeros(3, 32), f"{Q}x.lora_B.weight": torch.zeros(32, 3)}),
        "no such layer; load its own model",
    ),
    "half a pair": (lambda f: rewrite(f, **{f"{Q}.lora_B.weight": None}), "isn't plain LoRA.*no .*lora_B"),
    "embedding": (lambda f: rewrite(f, **{"base_model.model.model.embed_tokens.weight": torch.ones(1)}), "it holds"),
    "dora": (lambda f: rewrite(f, {"use_dora": True}), "sets use_dora; merge it with peft"),
    "other method": (lambda f: rewrite(f, {"peft_type": "IA3"}), "peft_type is 'IA3'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_adapter_is_refused_with_what_to_do(model_directory, adapter, tmp_path, fault):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    FAULTS[fault][0](folder)
    with pytest.raises(ConfigError, match=FAULTS[fault][1]) as raised:
        load(model_directory, folder)
    assert str(folder) in raised.value.message


@pytest.mark.parametrize("what", ["absent", "model", "file"])
def test_what_is_no_adapter_is_not_found(model_directory, adapter, what):
    folder = {"absent": Path("no/such"), "model": model_directory, "file": adapter / CARD}[what]
    with pytest.raises(NotFound, match="has no adapter_config"):
        load(model_directory, folder)


def test_an_adapter_of_another_model_is_not_trained_further(adapter):
    with pytest.raises(ConfigError, match="has other weights"):
        load_adapter(CausalLM(tiny_model("qwen2")), adapter)
    unknown = dataclasses.replace(Adapter.read(adapter), base="")
    with pytest.raises(ConfigError, match="for another model"):
        merge_adapter(tiny_model(kv_heads=4), unknown)


def test_a_plain_peft_directory_is_taken_without_a_policy(model_directory, adapter, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    rewrite(folder)
    plain = load(model_directory, folder)
    assert plain.adapter is not None
    assert plain.adapter.segment is None
    carded = load(model_directory, adapter)
    assert torch.equal(served(plain.lm, tiny_segment()), served(carded.lm, tiny_segment()))
