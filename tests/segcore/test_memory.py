"""The formulas of memory against what engines allocate, and the command that prints and checks them."""

from __future__ import annotations

import dataclasses
import gc
import re
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import services.memory
from segcore import memory
from segcore.config import (
    SEGMENT_CONFIGS,
    CacheConfig,
    Cell,
    DuoConfig,
    EngineConfig,
    LagKVConfig,
    LongGenConfig,
    LtriConfig,
    SegmentConfig,
    SegmentedConfig,
    segment_config,
)
from segcore.engine.engine import Engine
from segcore.engine.runner import Runner
from segcore.model import CausalLM, ModelSpec
from segcore.pastkv.manager import PastKVManager
from segcore.policies import POLICIES
from segcore.presets import model_segment
from segcore.retrieval import INDEXES, IndexSpec
from services.cli import main
from services.memory import SHAPES, Figure, measure, tensor_bytes
from tests.conftest import tiny_model, tiny_segment
from tests.segcore.test_invariants import MATRIX

# Blocks long enough that a file's header doesn't count for much.
LONG = {"segment_tokens": 64}
PAPERS = {
    "longgen": LongGenConfig(segment_tokens=64, full_layers=(1,), sink_tokens=4, window_tokens=50),
    "longgen-strided": LongGenConfig(segment_tokens=64, window_tokens=16, stride_blocks=3, block_tokens=4),
    "duo": DuoConfig(segment_tokens=64, retrieval=(Cell(0, 1),), sink_tokens=4, window_tokens=30),
    "lagkv": LagKVConfig(segment_tokens=64, sink_tokens=4, lag_tokens=16, keep=0.5),
    "ltri": LtriConfig(
        segment_tokens=64,
        reader_tail_tokens=8,
        retrieved_tokens=16,
        query_window_tokens=8,
        selectors=(Cell(1, 0),),
        span_max_tokens=8,
    ),
}
CONFIGS: dict[str, SegmentConfig] = {
    name: dataclasses.replace(config, **LONG) for name, config in MATRIX.items() if name not in PAPERS
} | {name: config for name, config in PAPERS.items() if config.policy in POLICIES}


@pytest.fixture(autouse=True)
def _frozen() -> Iterator[None]:
    """Tensors are counted by walking all objects: what there is before a test needn't be walked each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def measured(lm: CausalLM, config: SegmentConfig, weights: int = 0) -> dict[str, Figure]:
    engine = EngineConfig(segment=config, chunk_tokens=24)
    return {figure.name: figure for figure in measure(lm, engine, weights)}


# Every policy as it is served, and each way of searching in the other shapes too.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kv_heads", "dtype"),
    [(name, 2, torch.bfloat16) for name in CONFIGS]
    + [
        (name, 4, dtype)
        for name in ("segmented", "segmented-paper", "ltri")
        for dtype in (torch.float64, torch.bfloat16)
    ],
    ids=str,
)
def test_the_formulas_say_what_an_engine_allocates(name, kv_heads, dtype):
    before = tensor_bytes()
    lm = CausalLM(tiny_model(kv_heads=kv_heads, dtype=dtype))
    figures = measured(lm, CONFIGS[name], tensor_bytes() - before)
    assert {name: (f.measured, f.expected) for name, f in figures.items() if not f.ok} == {}
    state = figures["a state in its slot, memory"]
    assert abs(state.deviation) < (1e-3 if dtype == torch.float64 else 4e-3)
    assert state.measured > 1000


def test_every_policy_has_formulas():
    spec = SHAPES["llama-3.1-8b"].spec(torch.bfloat16)
    for policy in SEGMENT_CONFIGS:
        config = segment_config(policy)
        made = memory.lines(spec, 1, EngineConfig(segment=config), 10_000)
        assert {line.part for line in made} >= {"engine", "state", "journal"}
        assert memory.grows(spec, config) == (policy in {"full", "longgen", "lagkv", "duo"}), policy

    class Unknown(SegmentConfig):
        policy = "unknown"

    with pytest.raises(NotImplementedError, match="unknown"):
        memory.lines(spec, 1, EngineConfig(segment=Unknown()), 10_000)


def bytes_of(name: str, place: str, config: SegmentConfig, tokens: int = 1000, model: str = "llama-3.1-8b") -> float:
    made = memory.lines(SHAPES[model].spec(torch.bfloat16), 0, EngineConfig(segment=config), tokens)
    return sum(line.bytes for line in made if (line.name, line.place) == (name, place))


def test_growing_policies_by_hand():
    """Llama-3.1-8B in bf16: 8 heads of 128, so 6,144 bytes a row of a layer."""
    row, name = 8 * 3 * 128 * 2, "state that grows"
    assert bytes_of(name, "device", segment_config("full")) == 32 * row
    assert bytes_of(name, "device", LongGenConfig()) == 12 * row
    assert bytes_of(name, "device", LongGenConfig(stride_blocks=4)) == (12 + 20 / 4) * row
    assert bytes_of(name, "device", LagKVConfig(lag_tokens=128, keep=0.2)) == pytest.approx(32 * row * 25 / 128)
    assert bytes_of(name, "device", DuoConfig(retrieval=((0, 0), (5, 1)))) == 2 * row / 8
    # The last close is at 3,072 = 16 + 2 * 1,024 + 1,008 tokens: one lag has halved; 116 tokens are open.
    live = bytes_of("live rows, choosing", "host", LagKVConfig(segment_tokens=512), tokens=3188)
    assert live == 32 * row * (3072 - 512 + 116)


def test_readers_locals_and_the_segment_alone():
    tokens, number = 1024, 128 * 2
    some = SegmentedConfig(readers=((0, 0), (1, 0), (2, 0)), segment_only=((3, 0),), selectors=((9, 1),))
    assert bytes_of("past KV of the readers", "host", some) == 3 * 2 * number
    assert bytes_of("index", "host", some) == number
    local = 32 * 8 - 3 - 1
    boundary = 1 * 4 * 64 * number + 8 * 512 + 128_256 * 2 + 2 * local * (4 + 512) * number
    assert bytes_of("boundary", "host", some) == boundary
    rows = 3 * (4 + 512 + 256) + local * (4 + 512) + 256 * 10
    parked = bytes_of("live rows, choosing", "host", some, tokens + 10)
    assert parked == rows * 3 * number + 4 * 64 * number + 8 * 512
    own = dataclasses.replace(some, selection="cell", selectors=())
    assert bytes_of("index", "host", own) == 3 * number
    assert bytes_of("retrieved positions", "device", own, 10_000) == 8 * 3 * 512
    none = dataclasses.replace(some, retrieved_tokens=0)
    assert bytes_of("past KV of the readers", "host", none) == bytes_of("boundary", "host", none) == 0


@pytest.mark.parametrize("model", SHAPES)
def test_the_shapes_are_the_models(model):
    """Parameters counted on a model without memory; the numbers of its configuration are those published."""
    shape = SHAPES[model]
    hidden, mlp, tied = {
        "smollm2-135m-instruct": (576, 1536, True),
        "llama-3.1-8b": (4096, 14336, False),
        "llama-2-7b": (4096, 11008, False),
    }[model]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        tie_word_embeddings=tied,
        num_hidden_layers=shape.layers,
        num_key_value_heads=shape.kv_heads,
        num_attention_heads=shape.kv_heads * shape.queries_per_kv_head,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.max_positions,
    )
    assert hidden == shape.head_dim * config.num_attention_heads
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) == shape.parameters


@pytest.mark.slow
def test_the_default_shape_is_the_default_models():
    from segcore.weights import default_model_directory

    config, shape = AutoConfig.from_pretrained(default_model_directory()), SHAPES["smollm2-135m-instruct"]
    assert (
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.vocab_size,
        config.max_position_embeddings,
    ) == (
        shape.layers,
        shape.kv_heads,
        shape.vocabulary,
        shape.max_positions,
    )


LARGE = SegmentedConfig(segment_tokens=4096, selectors=((0, 0), (0, 1)))
DOCUMENTED = {
    "smollm2-135m-instruct": model_segment("smollm2-135m-instruct", {}, adapter="default"),
    "llama-3.1-8b": LARGE,
    "llama-2-7b": LARGE,
}


def documented_column(model: str) -> dict[str, int]:
    """The table of docs/memory.md for one model, in bf16, for streams of a million tokens."""
    shape, million, segment = SHAPES[model], 1_000_000, DOCUMENTED[model]
    spec, config = shape.spec(torch.bfloat16), EngineConfig(segment=segment, cache=CacheConfig(directory=Path()))
    made = memory.lines(spec, shape.parameters, config, million)
    full = EngineConfig(segment=segment_config("full", segment_tokens=segment.segment_tokens))

    def each(place: str, unit: str, *parts: str) -> float:
        here = [
            line for line in made if (line.place, line.unit) == (place, unit) and line.part in (parts or (line.part,))
        ]
        return sum(line.bytes for line in here if not line.at_most)

    grown = memory.lines(spec, shape.parameters, full, million)
    return {
        "weights": round(each("device", "engine")),
        "a slot": round(each("device", "slot")),
        "a session's logits": round(each("device", "session", "state")),
        "a parked session": round(each("host", "parked session")),
        "past KV, index and keys searched, a token": round(each("host", "closed token")),
        "codes and decoders searched, a token": round(each("device", "closed token")),
        "boundary, a segment": round(each("host", "segment")),
        "all of it on disk, a token": round(
            each("disk", "closed token") + each("disk", "segment") / segment.segment_tokens
        ),
        "policy `full`, a token": round(next(x.bytes for x in grown if x.unit == "token in a slot")),
        "policy `full`, this stream": round(sum(x.bytes * million for x in grown if x.unit == "token in a slot")),
    }


def documented_table() -> dict[str, list[int]]:
    columns = [documented_column(model) for model in DOCUMENTED]
    return {name: [column[name] for column in columns] for name in columns[0]}


def test_the_documents_table_is_the_functions():
    """Every row of docs/memory.md's table of models, computed again."""
    text = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    rows = dict(re.findall(r"^\| (.+?) \| ([\d,]+ \| [\d,]+ \| [\d,]+) \|$", text, flags=re.MULTILINE))
    documented = {name: [int(cell.replace(",", "")) for cell in cells.split(" | ")] for name, cells in rows.items()}
    assert documented == documented_table()


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 63, 64, 65, 130])
@pytest.mark.parametrize("device_rows", [0, 3, 64, 100, 200])
@pytest.mark.parametrize("name", ["lowrank", "exhaustive"])
def test_what_is_searched_is_the_index_s_pages(name, device_rows, rows, monkeypatch):
    segment, row = 16, 2 * (8 * 8 if name == "exhaustive" else 3) * 16 + 2 * 8 * 3 * 4 * (name == "lowrank")
    monkeypatch.setattr(IndexSpec, "device_budget_bytes", device_rows * row)
    device = torch.device("cpu")
    index = INDEXES[name](
        IndexSpec(
            selectors=2, head_dim=8, dtype=torch.float64, device=device, block=4, device_budget_bytes=device_rows * row
        )
    )
    for _ in range(rows):
        index.append(torch.randn(2, segment, 8, dtype=torch.float64))
    config = EngineConfig(segment=tiny_segment(index=name, selectors=((0, 0), (0, 1))))
    spec = ModelSpec("tiny", 2, 2, 2, 8, 8**-0.5, 300, 512, torch.float64, device)
    searched = [m for m in memory.lines(spec, 0, config, rows * segment) if "searched" in m.name]
    counts = {"closed token": rows * segment, "session": 1}
    sums = {place: sum(m.bytes * counts[m.unit] for m in searched if m.place == place) for place in ("device", "host")}
    assert sums == pytest.approx({"device": index.device_bytes, "host": index.host_bytes})


def test_totals_of_many_sessions():
    config = EngineConfig(segment=tiny_segment(selectors=((0, 1),)), slots=2)
    spec = ModelSpec("tiny", 2, 2, 2, 8, 8**-0.5, 300, 512, torch.float64, torch.device("cpu"))
    made = memory.lines(spec, 1000, config, 40)
    sums = memory.total(made, config, sessions=5, tokens=40)
    row = 3 * 8 * 8
    queries, chosen, logits = 2 * 6 * 64, 8 * 8, 300 * 8
    engine = 8000 + sum(line.bytes for line in made if line.unit == "engine" and line.at_most)
    codes = 32 * 3 + 2 * 8 * 3 * 4
    assert sums["device"] == engine + 2 * (4 * (14 + 16) * row + queries + chosen) + 5 * (logits + codes)
    past = 32 * (4 * 2 + 2) * 64 + 2 * (queries + chosen + logits)
    parked = 4 * (14 + 8) * row + queries + chosen
    journal = 40 * 4 + 40 * 8 / 16
    assert sums["host"] == pytest.approx(3 * parked + 5 * (past + journal * 17 / 16 + 84), abs=1)
    assert sums["disk"] == 0
    tight = dataclasses.replace(config, cache=dataclasses.replace(config.cache, host_bytes=1000))
    assert memory.total(made, tight, sessions=5, tokens=40)["host"] == round(sums["host"] - 5 * past + 1000)


def test_passes_leave_nothing_behind_but_the_state(tiny_lm):
    """No mask or other scratch stays, whatever the passes' shapes."""
    config = tiny_segment(segment_tokens=64)
    before = tensor_bytes()
    runner, past = Runner(tiny_lm, config), PastKVManager(CacheConfig()).open_stream(None)
    state = runner.begin()
    with torch.inference_mode():
        for count in (24, 23, 16):  # short of a segment's end
            runner.advance(torch.ones(count, dtype=torch.long), state, past)
    assert tensor_bytes() - before == state.nbytes


@pytest.mark.parametrize("segments", [1, 2, 3, 7, 8, 30])
def test_room_that_doubles_is_at_most_twice_what_it_holds(tiny_lm, segments):
    runner = Runner(tiny_lm, MATRIX["full"])
    state, past = runner.begin(), PastKVManager(CacheConfig()).open_stream(None)
    for _ in range(segments):
        state.filled = 16
        state.length += 16
        runner.policy.close(state, past)
    rows = state.layers[0][0].k_HND.shape[1]
    assert 16 * (segments + 1) <= rows <= 2 * 16 * (segments + 1)
    made = memory.lines(tiny_lm.spec, 0, EngineConfig(segment=MATRIX["full"]), state.length)
    slot = sum(x.bytes * {"slot": 1, "token in a slot": state.length}.get(x.unit, 0) for x in made)
    assert slot == state.nbytes


def test_a_closed_session_leaves_nothing(tiny_lm):
    """Not even in the frames of the engine's thread."""
    engine = Engine(tiny_lm, EngineConfig(segment=tiny_segment(), chunk_tokens=8))
    engine.open("s")
    engine.append("s", list(range(40)))
    engine.flush("s").result(30)
    engine.check_integrity()
    session = weakref.ref(engine._sessions["s"])
    engine.close("s")
    gc.collect()
    assert session() is None
    engine.shutdown()


def run(*arguments: str) -> int:
    return main(["memory", *arguments])


SMALL = (
    "segment_tokens=64,sink_tokens=2,tail_tokens=8,reader_tail_tokens=4,retrieved_tokens=16,query_window_tokens=8,"
    "block_tokens=2"
)


def test_the_command_prints_and_checks(model_directory, capsys):
    options = f"{SMALL},selectors=[[0,1],[1,0]]"
    assert run(str(model_directory), "--segment", options, "--sessions", "3", "--tokens", "1000") == 0
    out = capsys.readouterr().out
    assert "float32" in out or "bfloat16" in out
    assert "3 x 1,000 tokens" in out
    for name in ("weights", "a state in its slot, memory", "two closed segments, disk", "a fork, memory"):
        assert re.search(rf"^{name} +[\d,]+ +[\d,]+ +[+-][0-4]\.\d\d%", out, flags=re.MULTILINE), name


@pytest.mark.parametrize("wrong", [0.9, 1.1])
def test_the_command_fails_where_a_formula_is_wrong(model_directory, capsys, monkeypatch, wrong):
    real = memory.lines

    def planted(*args):
        made = real(*args)
        return [dataclasses.replace(m, bytes=m.bytes * wrong) if "closed" in m.unit else m for m in made]

    monkeypatch.setattr(services.memory, "lines", planted)
    assert run(str(model_directory), "--segment", f"{SMALL},selectors=[[0,1]]") == 1
    captured = capsys.readouterr()
    assert "more than 5% off its formula: two closed segments, memory, two closed segments, disk\n" in captured.err
    assert "a fork, memory" in captured.out


@pytest.mark.parametrize("figure", [(104, 100, 0), (96, 100, 0), (50, 100, 50), (0, 0, 0)])
def test_figures_within_five_percent(figure):
    assert Figure(name="", measured=figure[0], expected=figure[1], slack=figure[2]).ok


@pytest.mark.parametrize("figure", [(106, 100, 0), (94, 100, 0), (46, 100, 50), (106, 100, 50), (1, 0, 0)])
def test_figures_beyond_five_percent(figure):
    assert not Figure(name="", measured=figure[0], expected=figure[1], slack=figure[2]).ok


def test_on_paper_nothing_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(services.memory, "load_model", None)
    options = "policy=streaming,window_tokens=1020,segment_tokens=1024"
    assert run("llama-3.1-8b", "--segment", options, "--no-check", "--tokens", "5000") == 0
    assert f"{3 * 32 * 8 * 2048 * 128 * 2:,}  device per slot" in capsys.readouterr().out
    assert run("llama-2-7b", "--segment", "policy=full") == 0
    out = capsys.readouterr().out
    assert "slots aren't of one size" in out
    assert "ends where the model's positions do, at 4,096" in out
    assert "nothing is measured" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("/no/such/model", "--segment", "policy=full"), "model '/no/such/model' can't be loaded"),
        (("llama-2-7b", "--segment", "policy=none"), "unknown policy 'none'"),
        (("llama-2-7b", "--segment", "policy=full,sinks=3"), "has no option sinks"),
        (("llama-2-7b", "--segment", "[oops"), "must read policy=NAME"),
        (("llama-2-7b",), "selectors=[[0,0],[0,1]]"),
        (("llama-2-7b", "--segment", "policy=full", "--dtype", "int3"), "dtype='int3' must be 'auto' or one of"),
    ],
)
def test_wrong_arguments_are_the_commands_usual_errors(capsys, arguments, message):
    assert run(*arguments) == 1
    assert message in capsys.readouterr().err
