"""A worker alone: what it resumes, refuses, keeps and exports."""

from __future__ import annotations

import errno
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from peft import PeftModel
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from segcore.adapter import PEFT_FILES
from segcore.errors import ConfigError, NonFiniteLoss
from segcore.presets import segment_preset
from segcore.training.stream import IGNORED, TrainingStream
from segcore.weights import load_model
from services.follow import told
from services.training import checkpoint, folders, learners, worker
from services.training.config import ScheduleSection, TrainConfig
from services.training.estimate import _shape, estimate, require_memory
from services.training.folders import TENSORS, export, latest, publish, unfinished
from services.training.metrics import LINES, read_lines
from services.training.schedule import rate
from services.training.worker import Run
from tests.conftest import tiny_model
from tests.services.training.conftest import Alone, lines, texts


@pytest.fixture
def config(values, tmp_path):
    def make(name="run", **changes):
        return TrainConfig.model_validate(values(tmp_path / "runs", name=name, **changes))

    return make


class Interrupted(Exception):
    pass


def interrupted(config, step, monkeypatch):
    """Runs until so many steps are taken, as if the process were killed then."""
    take_step = Run.take_step

    def dying(self, batch):
        if self.step == step:
            raise Interrupted
        take_step(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "take_step", dying)
        with pytest.raises(Interrupted):
            Alone(config).run.train()


def curve(config):
    """What was recorded, without what takes another time each time."""
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in read_lines(config.folder / LINES)]


def tensors(folder):
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) >= 2
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name


LEARNERS = {
    "weights": {},
    "weights with masters": {"dtype": "bfloat16"},
    "adapter": {"dtype": "bfloat16", "lora": {"rank": 4}},
    "selectors": {"freeze": True, "selectors": {"attention_teaches": True, "weight": 1.0}},
    "weights and selectors": {"selectors": {"attention_teaches": True}},
}


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_resumed_run_is_an_unbroken_one_to_the_last_bit(config, learner, monkeypatch):
    unbroken, broken = config("unbroken", **LEARNERS[learner]), config("broken", **LEARNERS[learner])
    Alone(unbroken).run.train()
    interrupted(broken, 5, monkeypatch)  # one step behind its checkpoint
    assert latest(broken.folder).name == "checkpoint-0000004"
    resumed = Alone(broken)
    assert resumed.run.step == 4
    assert resumed.run.train().step == 6
    assert curve(broken) == curve(unbroken)
    assert_same_bits(tensors(latest(broken.folder)), tensors(latest(unbroken.folder)))
    assert len([line for line in curve(unbroken) if "loss" in line]) == 6
    evaluations = [line["eval_loss"] for line in curve(unbroken) if "eval_loss" in line]
    assert evaluations[-1] < evaluations[0] or learner == "selectors"  # which need not choose otherwise


# Of the tiny model as it is made, four steps in fp64.
GOLDEN = {
    "loss": [7.193909343, 6.868559621, 5.357619923, 5.331873756],
    "eval_loss": [7.255751523, 5.109976649],
}


def test_the_curve_is_the_golden_one(config):
    """What a change to data, model, gradients, schedule or optimizer moves, wherever it is made."""
    Alone(config(steps=4, checkpoints={"every": 4}, schedule={"warmup_steps": 2})).run.train()
    for key, golden in GOLDEN.items():
        assert [line[key] for line in curve(config()) if key in line] == pytest.approx(golden, rel=1e-6)


def test_random_numbers_of_a_resumed_run_are_those_of_an_unbroken_one(config, monkeypatch):
    """As dropout would, or anything else that draws: here, which tokens are predicted."""
    loss_and_grad = learners.Predictions.loss_and_grad

    def drawn(self, stream, valid_tokens, choices):
        keep = torch.rand(len(stream.tokens_T)) < 0.3 + 0.4 * random.random()
        labels_T = torch.where(keep, stream.tokens_T, IGNORED)
        return loss_and_grad(self, TrainingStream(stream.name, stream.tokens_T, labels_T), valid_tokens, choices)

    monkeypatch.setattr(learners.Predictions, "loss_and_grad", drawn)
    unbroken, broken = config("unbroken"), config("broken")
    Alone(unbroken).run.train()
    torch.rand(5), random.random()  # what another process would have drawn
    interrupted(broken, 5, monkeypatch)
    Alone(broken).run.train()
    assert curve(broken) == curve(unbroken)
    assert_same_bits(tensors(latest(broken.folder)), tensors(latest(unbroken.folder)))
    other = config("other", seed=1)
    Alone(other).run.train()
    assert curve(other) != curve(unbroken)


def test_each_worker_has_random_numbers_of_its_own_at_each_step(config, monkeypatch):
    run, seeds = Alone(config(steps=2)).run, []
    monkeypatch.setattr(worker, "seed_everything", lambda *given: seeds.append(given))
    batch = next(run.data.batches())
    for rank in (0, 1):
        run.workers.rank = rank
        run.take_step(batch)
    assert seeds == [(0, 0, 0), (0, 1, 1)]
    drawn = []
    for given in [*seeds, (0, 0, 1), (0, 1, 0), (1, 0, 0)]:
        learners.seed_everything(*given)
        drawn.append((random.random(), torch.rand(()).item()))
    assert len({number for pair in drawn for number in pair}) == 10


def until_killed(config):
    """What a process runs that is killed while it writes the second checkpoint."""
    torch.set_num_threads(1)
    save_training = worker.save_training

    def killed(folder, tensors, progress):
        if progress.step == 4:
            (folder / "training.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        save_training(folder, tensors, progress)

    worker.save_training = killed
    Alone(TrainConfig.model_validate_json(config)).run.train()


@pytest.mark.slow
def test_a_run_that_was_killed_over_a_checkpoint_goes_on_as_if_unbroken(config):
    unbroken, broken = config("unbroken"), config("broken")
    process = multiprocessing.get_context("spawn").Process(target=until_killed, args=(broken.to_json(),))
    process.start()
    Alone(unbroken).run.train()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert latest(broken.folder).name == "checkpoint-0000002"
    assert list(broken.folder.glob(".*.partial"))
    (broken.folder / ".checkpoint-0000003.partial").mkdir()  # of a run that wrote more of them
    Alone(broken).run.train()
    assert not list(broken.folder.glob(".*"))
    assert curve(broken) == curve(unbroken)
    assert_same_bits(tensors(latest(broken.folder)), tensors(latest(unbroken.folder)))


def test_masters_are_kept_where_weights_are_narrow(config):
    Alone(config(dtype="bfloat16", steps=1)).run.train()
    saved = load_file(latest(config().folder) / TENSORS)
    assert saved["lm_head.weight/master"].dtype == torch.float32
    wide = config("wide", steps=1)
    Alone(wide).run.train()
    assert not [name for name in load_file(latest(wide.folder) / TENSORS) if name.endswith("/master")]


def test_another_configuration_or_data_set_is_not_gone_on_with(config, monkeypatch, text_file, tmp_path):
    interrupted(config(), 3, monkeypatch)
    with pytest.raises(ConfigError, match="step 2 with another optimizer, seed;"):
        Alone(config(seed=3, optimizer={"learning_rate": 0.02}))
    mine = tmp_path / "texts.jsonl"
    shutil.copy(text_file, mine)
    data = {"sources": [{"files": [str(mine)]}], "streams_per_step": 4}
    interrupted(config("mine", data=data), 3, monkeypatch)
    mine.write_text(lines([*texts(11), "changed"]))
    with pytest.raises(ConfigError, match="data set has changed since step 2"):
        Alone(config("mine", data=data))


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_its_streams(config, monkeypatch):
    alone = Alone(config())
    take_step = Run.take_step

    def poisoned(self, batch):
        if self.step == 3:
            self.learner.model.lm.model.lm_head.weight.data[7] = torch.nan
        take_step(self, batch)

    monkeypatch.setattr(Run, "take_step", poisoned)
    with pytest.raises(NonFiniteLoss, match="step 3: stream") as raised:
        alone.run.train()
    (file,) = (config().folder / "nonfinite").iterdir()
    saved = json.loads(file.read_text())
    assert raised.value.details["stream"] in [stream["name"] for stream in saved]
    assert len(saved) == 4
    assert all(len(stream["tokens"]) == len(stream["targets"]) for stream in saved)
    assert latest(config().folder).name == "checkpoint-0000002"


def no_room(path):
    return namedtuple("usage", "free")(3 * 2**20)


def no_space(tensors, path):
    path.write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [(folders.shutil, "disk_usage", no_room), (checkpoint, "save_file", no_space)],
    ids=["nothing left for others", "while it is written"],
)
def test_a_full_disk_costs_a_checkpoint_and_neither_the_last_one_nor_the_run(
    config, monkeypatch, capsys, where, name, fault
):
    good = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *given: (fault if alone.run.step == 4 else good)(*given))
    alone = Alone(config())
    assert alone.run.train().step == 6
    assert sorted(p.name for p in config().folder.glob("*checkpoint*")) == ["checkpoint-0000002", "checkpoint-0000006"]
    assert len(alone.reported) == 3
    said = [told(line) for line in capsys.readouterr().out.splitlines()]
    assert any("no checkpoint at step 4; the last one stays" in line.get("warning", "") for line in said if line)


def test_a_checkpoint_that_does_not_reach_the_disk_does_not_appear(tmp_path, monkeypatch):
    def made(text):
        with unfinished(tmp_path, "checkpoint-0000002") as folder:
            (folder / "a").write_text(text)
        return folder

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(folders.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            publish(made("one"))
    assert list(tmp_path.iterdir()) == []
    first = made("one")
    assert latest(tmp_path) is None
    assert publish(first) == latest(tmp_path)
    assert (publish(made("two")) / "a").read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_export_is_what_plain_transformers_loads(config, tmp_path):
    alone = Alone(config(steps=2))
    alone.run.train()
    export(latest(config().folder), tmp_path / "out")
    assert not list((tmp_path / "out").glob("training.*"))
    with pytest.raises(ConfigError, match="is there already"):
        export(latest(config().folder), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert model.config._attn_implementation != "segcore"
    trained = dict(alone.run.learner.model.lm.model.named_parameters())
    assert all(torch.equal(value, trained[name]) for name, value in model.named_parameters())
    tokens = torch.tensor([tokenizer.encode(texts(4)[0])])
    plain = model(tokens, labels=tokens).loss.item()  # shorter than a segment: full attention
    ours = alone.run.learner.scorer().score(TrainingStream("text", tokens[0]))
    assert ours.mean == pytest.approx(plain, rel=1e-5)  # transformers rotates in fp32
    load_model(str(tmp_path / "out"), dtype="float64", device="cpu")
    assert segment_preset(str(tmp_path / "out")) == config().segment_config()  # what serving runs it under


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own code
def test_an_adapter_is_exported_for_serving_and_plain_peft(config, model_directory, tmp_path):
    alone = Alone(config(steps=2, lora={"rank": 4, "modules": ["q_proj", "down_proj"]}))
    alone.run.train()
    assert {name.rsplit(".", 3)[1] for name in alone.run.learner.named} == {"lora_A", "lora_B"}
    export(latest(config().folder), tmp_path / "out")
    merged = load_model(str(model_directory), dtype="float64", device="cpu", adapter=tmp_path / "out")
    assert merged.adapter.segment == config().segment_config()
    plain = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float64)
    tokens = torch.tensor([merged.tokenizer.tokenizer.encode(texts(4)[0])])
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "out"))(tokens, labels=tokens).loss.item()
    ours = alone.run.learner.scorer().score(TrainingStream("text", tokens[0]))
    assert ours.mean == pytest.approx(adapted, rel=1e-5)


@pytest.mark.parametrize("balance", ["targets", "streams"])
def test_a_steps_loss_is_the_mean_of_its_targets_or_of_its_streams(config, balance):
    run = Alone(config(steps=1, balance=balance)).run
    batch = next(run.data.batches())
    scores = [run.learner.scorer().score(stream) for stream in batch]
    assert len({score.tokens for score in scores}) > 1
    by_targets = sum(score.total for score in scores) / sum(score.tokens for score in scores)
    by_streams = sum(score.mean for score in scores) / len(scores)
    run.take_step(batch)
    assert run.metrics["loss"] == pytest.approx(by_targets if balance == "targets" else by_streams, rel=1e-10)


def test_an_adapter_is_exported_in_its_models_precision(config, tmp_path):
    alone = Alone(config(steps=2, dtype="bfloat16", lora={"rank": 4}))
    alone.run.train()
    export(latest(config().folder), tmp_path / "out")
    trained = {f"base_model.model.{name}": p.detach() for name, p in alone.run.learner.named.items()}
    exported = load_file(tmp_path / "out" / PEFT_FILES[1])
    for name, weight in exported.items():
        wide = trained[name.replace(".weight", ".default.weight")]
        assert (weight.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
        assert weight.equal(wide.bfloat16())
    assert len(exported) == len(trained)


def test_a_run_that_cannot_fit_is_refused_before_weights_are_loaded(config, monkeypatch):
    monkeypatch.setattr(learners, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=r"about 0\.00 GiB of its device, which has 0\.00 GiB: weights .*, optimizer"):
        Alone(config(device_bytes=100_000))


def test_the_estimate_counts_what_is_trained_and_who_keeps_it(config):
    n, adapter = tiny_model().num_parameters(), 2 * 4 * (32 + 32)  # q_proj of two layers, rank 4

    def parts(dtype, **changes):
        made = config(**changes)
        found = estimate(made, _shape(made.model), dtype, torch.device("cpu"))
        return [found[name] for name in ("weights", "gradients", "masters", "optimizer")]

    assert parts(torch.float32) == [4 * n, 4 * n, 0, 8 * n]
    assert parts(torch.bfloat16) == [2 * n, 4 * n, 4 * n, 8 * n]
    shared = {"workers": {"count": 2, "parallel": "fsdp"}}
    assert parts(torch.bfloat16, **shared) == [2 * n, 4 * n, 2 * n, 4 * n]
    lora = {"lora": {"rank": 4, "modules": ["q_proj"]}}
    assert parts(torch.bfloat16, **lora) == [2 * n, 4 * adapter, 0, 8 * adapter]


def test_what_a_gguf_model_takes_is_estimated_from_its_header(config, tmp_path):
    file = tmp_path / "tiny.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(512)
    writer.add_vocab_size(300)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    mine = config(model=str(file), device_bytes=100_000, dtype="float32")
    with pytest.raises(ConfigError, match=r"its device, which has 0\.00 GiB: weights"):
        require_memory(mine, torch.device("cpu"))
    named = config(dtype="float32")
    theirs = estimate(named, _shape(named.model), torch.float32, torch.device("cpu"))
    ours = estimate(mine, _shape(mine.model), torch.float32, torch.device("cpu"))
    assert {name: ours[name] for name in ("state", "activations", "logits")} == {
        name: theirs[name] for name in ("state", "activations", "logits")
    }
    assert 0.6 < ours["weights"] / theirs["weights"] <= 1


@pytest.mark.parametrize("checkpoint_layers", [True, False])
def test_the_estimate_of_what_graphs_hold_is_near_what_they_hold(config, checkpoint_layers):
    from tests.segcore.test_training import Saved

    alone = Alone(config(dtype="float32", checkpoint_layers=checkpoint_layers, k=0))
    stream = TrainingStream("long", torch.arange(128) % 250)
    with Saved() as saved:
        alone.run.learner.loss_and_grad(stream, 127, 0)
    shape = _shape(alone.run.config.model)
    parts = estimate(alone.run.config, shape, torch.float32, torch.device("cpu"))
    # Weights are held by graphs, too, and aren't theirs.
    assert saved.peak < parts["activations"] + parts["state"] + parts["logits"] + 2 * parts["weights"]
    assert parts["activations"] + parts["state"] < 4 * saved.peak


def test_rates_rise_and_fall():
    cosine = ScheduleSection(kind="cosine", warmup_steps=2, final=0.1)
    rates = [rate(cosine, step, 7) for step in range(7)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates == [*rates[:2], *sorted(rates[2:], reverse=True)]
    assert rates[-1] == pytest.approx(0.1)
    linear = ScheduleSection(kind="linear", final=0)
    assert [rate(linear, step, 5) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert rate(ScheduleSection(kind="constant"), 3, 5) == 1


def test_tensorboard_has_the_curve(config):
    Alone(config(steps=2)).run.train()
    assert [p for p in Path(config().folder / "tensorboard").iterdir() if p.stat().st_size > 100]


TRACKER = """
said = []
def set_tracking_uri(uri): said.append(uri)
def set_experiment(name): pass
def start_run(run_name, tags): said.append(run_name)
def log_metrics(metrics, step): said.append((step, metrics))
def end_run(): said.append("ended")
def init(name, dir, **more): return start_run(name, {}) or Run()
class Run:
    def log(self, metrics, step): log_metrics(metrics, step)
    def finish(self): end_run()
"""


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_trackers_have_the_curve(config, name, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValidationError, match=f"{name} isn't installed"):
        config(metrics={"trackers": [name]})
    (tmp_path / f"{name}.py").write_text(TRACKER)
    importlib.invalidate_caches()
    tracked = config(steps=2, metrics={"trackers": [name]})
    Alone(tracked).run.train()
    said = sys.modules.pop(name).said
    assert said[-1] == "ended"
    tracked_losses = [(each[0], each[1]["loss"]) for each in said if isinstance(each, tuple) and "loss" in each[1]]
    assert tracked_losses == [(line["step"], line["loss"]) for line in curve(tracked) if "loss" in line]
    if name == "mlflow":
        assert said[0] == f"sqlite:///{tracked.storage}/mlflow.db"
