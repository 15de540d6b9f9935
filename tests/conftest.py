"""Shared parts: tiny random models, a tiny tokenizer, and a directory that holds both as transformers writes them."""

from __future__ import annotations

import itertools
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from _pytest.terminal import TerminalReporter
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from segcore.config import Cell, LtriConfig, SegmentedConfig
from segcore.engine.speed import Speed
from segcore.model import CausalLM
from tests.redis_server import RedisServer
from tests.tokenizers import CHAT_TEMPLATE, byte_tokenizer

VOCABULARY = 300
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 8}),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, a file's run in one, for they share fixtures; so do all that start Ray."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            starts_ray = item.get_closest_marker("e2e") or "cluster" in getattr(item, "fixturenames", ())
            item.add_marker(pytest.mark.xdist_group("ray" if starts_ray else item.path.stem))


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[object], None]:
    """Tells what a test did, and what was lost, to whoever runs the tests: at the run's end."""
    return partial(record_property, "said")


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    said: dict[str, None] = {}  # each once, though setup and teardown repeat what the call said
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        for name, text in getattr(report, "user_properties", ()):
            if name == "said":
                said[f"{report.nodeid}: {text}"] = None
    if said:
        terminalreporter.section("said by tests")
        terminalreporter.write_line("\n".join(said))


@pytest.fixture(scope="session", autouse=True)
def _restoring_is_quicker() -> Iterator[None]:
    """Past KV that is there is taken up: no test may depend on how quick the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Speed, "seconds", lambda *_: None)
        yield


def tiny_model(family: str = "llama", *, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Two layers, four query heads of 8: random, but the same on every call."""
    config, model, extra = FAMILIES[family]
    torch.manual_seed(7)
    made = model(
        config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=None,
            # Wide initial weights make attention peaky, so that what is attended to shows in the logits.
            initializer_range=0.3,
            tie_word_embeddings=False,
            **extra,
        )
    )
    return made.to(dtype).eval()


SEGMENT = {
    "segment_tokens": 16,
    "sink_tokens": 2,
    "tail_tokens": 8,
    "reader_tail_tokens": 4,
    "retrieved_tokens": 8,
    "block_tokens": 2,
    "query_window_tokens": 6,
    "selectors": (Cell(0, 1), Cell(1, 0)),
}


def tiny_segment(**changes: object) -> SegmentedConfig:
    """Policy `segmented` with a segment of 16 tokens, small enough that a short stream crosses many boundaries."""
    return SegmentedConfig(**(SEGMENT | changes))  # type: ignore[arg-type]


SPANS = {
    "segment_tokens": 16,
    "sink_tokens": 2,
    "reader_tail_tokens": 4,
    "retrieved_tokens": 8,
    "query_window_tokens": 6,
    "selectors": (Cell(1, 0), Cell(1, 1)),
    "local_tokens": 16,
    "span_min_tokens": 2,
    "span_max_tokens": 4,
    "vote_tokens": 2,
}


def tiny_spans(**changes: object) -> LtriConfig:
    """Policy `ltri` with a segment of 16 tokens, cut into spans of 2 to 4."""
    return LtriConfig(**(SPANS | changes))  # type: ignore[arg-type]


# Of services and evaluations of a tiny model, as their configuration files write it.
SERVED_SEGMENT = {
    "segment_tokens": 64,
    "sink_tokens": 2,
    "tail_tokens": 32,
    "reader_tail_tokens": 16,
    "retrieved_tokens": 32,
    "block_tokens": 4,
    "query_window_tokens": 8,
    "selectors": [[0, 1], [1, 0]],
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_lm() -> CausalLM:
    return CausalLM(tiny_model())


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in fp32 with a byte tokenizer and a chat template, on disk."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model(dtype=torch.float32).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _redis_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if shutil.which("redis-server") is None:
        pytest.fail("redis-server isn't installed: make redis")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def redis_server(_redis_session: RedisServer) -> RedisServer:
    """The session's server, empty."""
    with _redis_session.client() as client:
        client.flushall()
    return _redis_session


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that the test may do anything to."""
    if shutil.which("redis-server") is None:
        pytest.fail("redis-server isn't installed: make redis")
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder)
    server.start()
    yield server
    server.signal(signal.SIGCONT)
    server.kill()
