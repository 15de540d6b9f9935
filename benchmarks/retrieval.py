"""The shipped index of selector keys against the oracle: memory, time of a refresh, recall, at four lengths.

.venv/bin/python -m benchmarks.retrieval                 # writes benchmarks/results/retrieval.json, docs/retrieval.png
python -m benchmarks.retrieval --model smollm2.gguf      # on a GPU: retrieval-cuda.json, docs/retrieval-cuda.png
python -m benchmarks.retrieval --random-weights          # without weights: synthetic keys only; times are the same

Synthetic keys: a mean of norm 15, a topic of norm 3 per 16 segments, a vector of the token's type (Zipf over 8,192
types) and noise of half its power; types and noise have standard deviation 2 / sqrt(1 + (i / 14)^6) in the i-th of 64
random orthogonal directions, the spectrum of SmolLM2's selectors. A query looks for its own token's type, with noise.
Real keys: the default model's, of texts found on this machine, streamed by the engine's Runner without retrieved
tokens, so that no index takes part in making what it is measured with. Query windows: the last one of the L tokens that
are indexed, and the next ones after them. Times are the least of several, the machine being shared.

Shapes: C selectors, G query heads of a selector, W query window, N tokens, D head dimension.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.facts import essays
from benchmarks.record import RESULTS, ROOT, records, write
from segcore.config import CacheConfig, SegmentConfig
from segcore.engine.runner import Runner
from segcore.errors import ConfigError
from segcore.model import Attend, CausalLM
from segcore.pastkv.manager import PastKVManager
from segcore.presets import DEFAULT_MODEL, segment_preset
from segcore.retrieval import KeyIndex, make_index
from segcore.weights import LoadedModel, load_model

LENGTHS = {8192: "8k", 131072: "128k", 1048576: "1m", 10485760: "10m"}
WINDOWS = 4
HEADS, DIM, TYPES = 3, 64, 8192
PRESET = segment_preset(DEFAULT_MODEL)
SEGMENT, WINDOW, SELECTORS = PRESET.segment_tokens, PRESET.query_window_tokens, len(PRESET.selectors)
# Keys and queries of consecutive segments, [C, SEGMENT, D] and [C, G, SEGMENT, D].
Stream = Iterator[tuple[Tensor, Tensor]]


def synthetic(device: torch.device) -> Stream:
    """An endless stream of the distribution above."""
    rng = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device)

    basis_CDD = torch.linalg.qr(normal(SELECTORS, DIM, DIM).cpu())[0].to(device)
    std_D = 2 / (1 + (torch.arange(DIM, device=device) / 14) ** 6).sqrt()
    types_CTD = normal(SELECTORS, TYPES, DIM) * std_D
    means_2CD = torch.nn.functional.normalize(normal(2, SELECTORS, DIM) * std_D, dim=-1) * 15
    weights_T = 1 / torch.arange(1, TYPES + 1, device=device)
    segment = 0
    while True:
        if segment % 16 == 0:
            topic_CD = 3 * torch.nn.functional.normalize(normal(SELECTORS, DIM) * std_D, dim=-1)
        kinds_N = torch.multinomial(weights_T, SEGMENT, replacement=True, generator=rng)
        noise_CND = 0.7 * normal(SELECTORS, SEGMENT, DIM) * std_D
        keys = (means_2CD[0] + topic_CD)[:, None] + types_CTD[:, kinds_N] + noise_CND
        looks = 0.7 * types_CTD[:, None, kinds_N] + 0.7 * normal(SELECTORS, HEADS, SEGMENT, DIM) * std_D
        queries = means_2CD[1][:, None, None] + looks
        yield (keys @ basis_CDD.mT).bfloat16(), (queries @ basis_CDD.mT[:, None]).bfloat16()
        segment += 1


class Recorder:
    """A model that keeps the selectors' unrotated keys and queries of its latest pass."""

    def __init__(self, lm: CausalLM) -> None:
        self._lm, self.spec, self.rope, self.query_maps = lm, lm.spec, lm.rope, lm.query_maps
        self.head = lm.head
        self.keys: list[Tensor] = []
        self.queries: list[Tensor] = []

    def hidden(self, tokens_BT: Tensor, attends: Sequence[Attend]) -> Tensor:
        self.keys, self.queries = [], []
        (attend,) = attends

        def record(layer: int, q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float) -> Tensor:
            for cell in PRESET.selectors:
                if cell.layer == layer:
                    self.keys.append(k_HTD[cell.kv_head].clone())
                    self.queries.append(q_HGTD[cell.kv_head].clone())
            return attend(layer, q_HGTD, k_HTD, v_HTD, scale)

        return self._lm.hidden(tokens_BT, [record])


def stream_through(lm: CausalLM, segments: Iterator[Tensor]) -> Stream:
    """Keys and queries of a stream's segments, by the engine's Runner, nothing retrieved."""
    recorder = Recorder(lm)
    runner = Runner(recorder, plain())  # type: ignore[arg-type]
    state, past = runner.begin(), PastKVManager(CacheConfig()).open_stream(runner.policy.layout)
    for tokens in segments:
        runner.advance(tokens, state, past)
        yield torch.stack(recorder.keys), torch.stack(recorder.queries)


def plain() -> SegmentConfig:
    return dataclasses.replace(PRESET, retrieved_tokens=0)


def texts(paths: Sequence[Path]) -> Iterator[str]:
    """Essays, if the package that has them is installed, then sources and notes; or the files of `paths`."""
    text = ""
    with suppress(ConfigError):
        text = "" if paths else essays()
    yield from (text[i : i + 2**14] for i in range(0, min(len(text), 2**20), 2**14))
    roots = list(paths) or [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    kinds, seen = (".py", ".md", ".rst", ".txt", ".html"), set()
    for root in roots:
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in kinds and p.is_file())
        random.Random(0).shuffle(files)
        # A folder may lie within another.
        for file in (f for f in files if f not in seen):
            seen.add(file)
            yield file.read_text(errors="ignore")[: 2**18]


def token_segments(model: LoadedModel, paths: Sequence[Path]) -> Iterator[Tensor]:
    held: list[int] = []
    for text in texts(paths):
        held += model.tokenizer.encode_continuation(text)
        while len(held) >= SEGMENT:
            yield torch.tensor(held[:SEGMENT])
            held = held[SEGMENT:]


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Milliseconds of a call, the device's work included, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3, result


def prefill_ms(lm: CausalLM) -> float:
    """The least time of a full segment's forward pass, nothing retrieved."""
    runner = Runner(lm, plain())
    state, past = runner.begin(), PastKVManager(CacheConfig()).open_stream(runner.policy.layout)
    tokens = torch.arange(SEGMENT) % 1000 + 100
    with torch.inference_mode():
        return min(timed(lambda: runner.advance(tokens, state, past), lm.spec.device)[0] for _ in range(6))


def random_model(device: torch.device) -> CausalLM:
    """The default model's shape with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return CausalLM(LlamaForCausalLM(config).to(torch.bfloat16).to(device))


def measure(stream: Stream, kind: str, lengths: Sequence[int], segment_ms: float, device: torch.device) -> Iterator:
    """(name, value, unit, target) of each figure, one stream indexed once, searched at each length."""
    make = {"dtype": torch.bfloat16, "device": device, "block": PRESET.block_tokens}
    index, oracle = (make_index(n, selectors=SELECTORS, head_dim=DIM, **make) for n in ("lowrank", "exhaustive"))
    append_ms: list[float] = []
    ahead: tuple[Tensor, Tensor] | None = None
    for length in lengths:
        while index.length < length:
            segment = ahead or next(stream, None)
            if segment is None:
                print(f"the texts end after {index.length} tokens: name more with --text")
                return
            (keys, queries), ahead = segment, None
            append_ms.append(timed(lambda keys=keys: index.append(keys), device)[0])
            oracle.append(keys)
        ahead = next(stream)
        following = torch.cat([queries[:, :, -WINDOW:], ahead[1]], dim=2)
        windows = [list(following[:, :, i * WINDOW : (i + 1) * WINDOW]) for i in range(WINDOWS)]
        # The first search at a length warms up: the same windows again are what counts.
        runs = [compare(index, oracle, window, device) for window in (windows[0], *windows)][1:]
        tag, at_1m = f"{kind}_{LENGTHS[length]}", length == 1048576
        refresh = min(run["ms"] for run in runs)
        yield f"{tag}_block_recall", sum(run["blocks"] for run in runs) / WINDOWS, "share of the oracle's", ">= 0.95"
        yield f"{tag}_token_recall", sum(run["tokens"] for run in runs) / WINDOWS, "share of the oracle's", ">= 0.95"
        yield f"{tag}_device_bytes", index.device_bytes / length, "bytes a token", "<= 64"
        yield f"{tag}_host_bytes", index.host_bytes / length, "bytes a token", None
        yield f"{tag}_refresh", refresh, "ms", None
        yield f"{tag}_refresh_share", refresh / segment_ms, "of a segment's prefill", "<= 0.1" if at_1m else None
        yield f"{tag}_oracle_refresh", min(run["oracle_ms"] for run in runs), "ms", None
    if append_ms:
        yield f"{kind}_append", sorted(append_ms)[len(append_ms) // 2], "ms a segment, median", None


def compare(index: KeyIndex, oracle: KeyIndex, window: list[Tensor], device: torch.device) -> dict[str, float]:
    """Time of a refresh of each, and the share of the oracle's choice that the index makes too."""
    limits = {
        "first": PRESET.sink_tokens,
        "stop": index.length - PRESET.reader_tail_tokens,
        "tokens": PRESET.retrieved_tokens,
        "block": PRESET.block_tokens,
    }
    ms, chosen = timed(lambda: index.search(window, **limits), device)
    oracle_ms, right = timed(lambda: oracle.search(window, **limits), device)
    blocks = torch.unique(right // PRESET.block_tokens)
    return {
        "ms": ms,
        "oracle_ms": oracle_ms,
        "tokens": torch.isin(right, chosen).float().mean().item(),
        "blocks": torch.isin(blocks, torch.unique(chosen // PRESET.block_tokens)).float().mean().item(),
    }


def draw(rows: Sequence[dict], path: Path) -> None:
    """Recall, and time of a refresh, over the length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = {row["name"]: row["value"] for row in rows}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for kind in ("synthetic", "real"):
        held = [(n, f"{kind}_{tag}") for n, tag in LENGTHS.items() if f"{kind}_{tag}_refresh" in values]
        tokens = [n for n, _ in held]
        left.plot(tokens, [values[f"{name}_block_recall"] for _, name in held], "o-", label=f"{kind} keys")
        for style, figure_name, label in (("o-", "refresh", "index"), ("s:", "oracle_refresh", "exhaustive")):
            right.plot(tokens, [values[f"{name}_{figure_name}"] for _, name in held], style, label=f"{label}, {kind}")
    right.axhline(values["segment_prefill"] / 10, color="grey", lw=1, label="a tenth of a segment's prefill")
    left.set(ylabel="recall of the oracle's blocks", ylim=(0, 1.05))
    right.set(ylabel="ms a refresh", yscale="log")
    for axes in (left, right):
        axes.set(xlabel="past tokens", xscale="log")
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"lowrank index, {rows[0]['machine']}, {rows[0]['date']}", fontsize=9)
    figure.savefig(path, dpi=110)


def draw_all() -> int:
    for path in sorted(RESULTS.glob("retrieval*.json")):
        draw(json.loads(path.read_text()), ROOT / "docs" / f"{path.stem}.png")
    return 0


def run() -> int:
    parser = argparse.ArgumentParser(description="The shipped index of selector keys against the oracle.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="where the default model's weights are (a .gguf file)")
    parser.add_argument("--random-weights", action="store_true", help="no weights here: times and synthetic keys only")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="files and folders instead of this machine's")
    parser.add_argument("--synthetic-tokens", type=int, default=max(LENGTHS), help="0: none")
    parser.add_argument("--real-tokens", type=int, help="default: 10M on a GPU, 128K on a CPU; 0: none")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--draw", action="store_true", help="draw the results that there are; measure nothing")
    options = parser.parse_args()
    if options.draw:
        return draw_all()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = None if options.random_weights else load_model(options.model)
    lm = random_model(device) if model is None else model.lm
    segment_ms = prefill_ms(lm)
    figures: list[tuple] = [("segment_prefill", segment_ms, f"ms for {SEGMENT} tokens", None)]
    affordable = max(LENGTHS) if device.type == "cuda" else 131072
    real_tokens = affordable if options.real_tokens is None else options.real_tokens
    streams = [("synthetic", synthetic(device), options.synthetic_tokens)]
    if model is not None and real_tokens:
        # The selectors' keys don't depend on later layers.
        layers = lm.model.base_model.layers
        lm.model.base_model.layers = layers[: max(cell.layer for cell in PRESET.selectors) + 1]
        streams.append(("real", stream_through(lm, token_segments(model, options.text)), real_tokens))
    with torch.inference_mode():
        for kind, stream, most in streams:
            for figure in measure(stream, kind, [n for n in LENGTHS if n <= most], segment_ms, device):
                print(*figure, flush=True)
                figures.append(figure)
    path = RESULTS / ("retrieval.json" if device.type == "cpu" else "retrieval-cuda.json")
    # Figures of an earlier run that this one didn't measure stay.
    held = {row["name"]: row for row in (json.loads(path.read_text()) if path.exists() else [])}
    command = " ".join(["-m benchmarks.retrieval", *sys.argv[1:]])
    made = records(command, [(*figure, None) for figure in figures])
    write(path.stem, list((held | {row["name"]: row for row in made}).values()))
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib isn't installed: draw the picture elsewhere, with --draw")
        return 0
    return draw_all()


if __name__ == "__main__":
    sys.exit(run())
