"""The engine on a GPU beside Hugging Face's full attention, on the same random bf16 weights, in one run.

python -m benchmarks.gpu                     # all shapes; writes results/gpu.json, and raw/gpu.json beside it
python -m benchmarks.gpu --shapes smollm2 --tokens 8192 131072 --dry
python -m benchmarks.gpu --shapes llama2_7b --decode    # our tokens alone, which no package of attention changes

Settings: S 4096, M 512, R 512, 4 sinks, two selector cells, retrieval and offload to host memory on, a boundary every
four segments; readers are the paper's 64 cells for Llama-2-7B and the middle third of the layers for the others. Peers:
transformers' own forward pass over the whole prompt at once, SDPA's flash kernels, last logits only; and the same in
chunks of S over a growing cache. Times are medians. Peaks are what torch allocated, and on our side also what CUDA
graphs reserve for themselves. A model's dense work is two operations for each weight of its layers and each token.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.record import RESULTS, Figure, add, records
from segcore.config import CacheConfig, Cell, EngineConfig, SegmentedConfig
from segcore.engine.engine import Engine
from segcore.engine.request import Generation
from segcore.engine.runner import Runner
from segcore.engine.snapshot import pack, unpack
from segcore.model import CausalLM
from segcore.pastkv.manager import PastKVManager
from segcore.pastkv.session import SessionPast
from segcore.presets import LONG_HEADS, LONG_LAYERS
from segcore.sampling import SamplingParams
from segcore.state import State

T = TypeVar("T")
COMMAND = "-m benchmarks.gpu"
S, GIB = 4096, 2**30
PEER_TOKENS = 131072
HOST_BYTES = 96 * GIB
PEER, CHUNKED = "Hugging Face, SDPA flash", "Hugging Face, SDPA flash, in chunks of 4096"


@dataclass(frozen=True)
class Shape:
    """A model of Llama's architecture with random weights.

    readers: None: a third of the layers. lengths: tokens of the prompts.
    """

    name: str
    config: dict[str, Any]
    readers: tuple[Cell, ...] | None = None
    lengths: tuple[int, ...] = (8192, 65536, 131072, 1048576)

    @property
    def cache(self) -> CacheConfig:
        return CacheConfig(host_bytes=HOST_BYTES, reuse=False, boundary_segments=4)

    def build(self) -> Any:
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(
                LlamaConfig(**self.config, max_position_embeddings=2**21),
                dtype=torch.bfloat16,
                attn_implementation="sdpa",
            )
        return model.eval().requires_grad_(False)

    def segment(self) -> SegmentedConfig:
        readers = self.readers
        if readers is None:
            third = self.config["num_hidden_layers"] // 3
            heads = range(self.config["num_key_value_heads"])
            readers = tuple(Cell(layer, head) for layer in range(third, 2 * third) for head in heads)
        return SegmentedConfig(
            segment_tokens=S,
            sink_tokens=4,
            tail_tokens=512,
            reader_tail_tokens=256,
            retrieved_tokens=512,
            selectors=(readers[0], readers[-1]),
            readers=readers,
        )


WIDE: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPES = [
    Shape(
        "llama2_7b",
        WIDE | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
        tuple(Cell(layer, head) for layer in LONG_LAYERS for head in LONG_HEADS),
    ),
    Shape("llama31_8b", WIDE | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}),
    Shape(
        "smollm2",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
    ),
]
# The shape that sessions are restored of, and many are decoded with; how many.
BATCHED, SESSIONS = "llama31_8b", (1, 8, 32, 64)
# Per shape: the least speed-up of a prefill of 128K tokens.
SPEEDUPS = {"llama2_7b": ">= 3.5", "llama31_8b": ">= 3.5", "smollm2": ">= 4"}


def seconds(act: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    act()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def median(act: Callable[[], Any], rounds: int) -> float:
    return statistics.median(seconds(act) for _ in range(rounds))


def peak_gib(act: Callable[[], Any]) -> float:
    torch.cuda.reset_peak_memory_stats()
    act()
    torch.cuda.synchronize()
    return peak_bytes() / GIB


def peak_bytes() -> int:
    """The most that tensors took, and what graphs keep for themselves, which torch doesn't count among them."""
    graphs = (segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0))
    kept = sum(segment["total_size"] - segment["allocated_size"] for segment in graphs)
    return torch.cuda.max_memory_allocated() + int(kept)


def ceilings() -> dict[str, float]:
    """What the chip does at best: matrix products in TFLOP/s, copies in TB/s read and written."""
    a, b = (torch.randn((8192, 8192), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    products = median(lambda: [a @ b for _ in range(10)], 5) / 10
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copies = median(lambda: [target.copy_(source) for _ in range(10)], 5) / 10
    return {"tflops": 2 * 8192**3 / products / 1e12, "tbps": 2 * 2**31 / copies / 1e12}


class Stream:
    """A stream on our side: F over whole segments, past KV written through to host memory."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.lm = shape, CausalLM(shape.build())
        self.lm.compile()
        self.runner = Runner(self.lm, shape.segment())
        self.begin()

    def begin(self) -> None:
        self.manager = PastKVManager(self.shape.cache, device=self.lm.spec.device)
        self.past, self.state = self.manager.open_stream(self.runner.policy.layout), self.runner.begin()

    def end(self) -> None:
        self.past.truncate(0)
        self.manager.close()
        del self.past, self.state, self.manager

    @torch.inference_mode()
    def run(self, tokens_T: Tensor) -> None:
        for segment in tokens_T.split(S):
            self.runner.advance(segment, self.state, self.past)

    @torch.inference_mode()
    def decode(self, tokens: int) -> float:
        """Median seconds of a token."""
        one = torch.tensor([7])
        return median(lambda: self.runner.advance(one, self.state, self.past), tokens)

    def decode_bytes(self) -> int:
        """What a token must read: weights but the embedding's, and the keys and values that it sees."""
        model = self.lm.model
        weights = sum(p.nbytes for p in (*self.lm.layers[0].parameters(),)) * len(self.lm.layers)
        weights += model.get_output_embeddings().weight.nbytes
        windows = (w for layer in self.state.layers for w in layer)
        rows = sum(len(w.heads) * (w.base + self.state.filled - w.start) for w in windows)
        return weights + 2 * rows * self.lm.spec.head_dim * self.lm.spec.dtype.itemsize


def measure_ours(shape: Shape, lengths: tuple[int, ...]) -> dict[str, Any]:
    stream = Stream(shape)
    tokens = random_tokens(max(lengths))
    stream.run(tokens[: 3 * S])  # compiles, and fills the buffers
    stream.decode(5)
    stream.end()
    weights = sum(p.numel() for layer in stream.lm.layers for p in layer.parameters())
    runs: dict[str, Any] = {"weights": weights, "prefill_s": {}, "peak_gib": {}, "decode_s": {}, "decode_bytes": {}}
    for length in lengths:
        prefills = []
        for _ in range(3 if length <= PEER_TOKENS else 1):
            stream.begin()
            torch.cuda.reset_peak_memory_stats()
            prefills.append(seconds(lambda n=length: stream.run(tokens[:n])))
            runs["decode_s"][length] = stream.decode(20)
            runs["peak_gib"][length] = peak_bytes() / GIB
            runs["decode_bytes"][length] = stream.decode_bytes()
            stream.end()
        runs["prefill_s"][length] = statistics.median(prefills)
        print(shape.name, length, {k: v[length] for k, v in runs.items() if k != "weights"}, flush=True)
    return runs


def measure_restore(shape: Shape) -> dict[str, float]:
    """Seconds until the first token of a stream of PEER_TOKENS: run anew, and restored by where its past KV is."""
    lm, taken = CausalLM(shape.build()), {}
    with tempfile.TemporaryDirectory() as shared:
        cache = dataclasses.replace(shape.cache, shared=shared)
        config = EngineConfig(segment=shape.segment(), cache=cache, chunk_tokens=S, slots=1)
        engine, streams = Engine(lm, config), [random_tokens(PEER_TOKENS, seed).tolist() for seed in range(3)]
        for name, tokens in (("warm", streams[0][: 3 * S]), ("again", streams[0][: 4 * S])):
            begin(engine, name, tokens)
            first_token(engine, name)
        times = []
        for i, tokens in enumerate(streams):
            times.append(
                seconds(lambda i=i, tokens=tokens: (begin(engine, f"{i}", tokens), first_token(engine, f"{i}")))
            )
        taken["recompute"] = statistics.median(times)
        data = [engine.snapshot(f"{i}") for i in range(len(streams))]
        for tier in ("host", "disk"):
            times = []
            for i, snapshot in enumerate(data):
                name = f"{tier} {i}"
                times.append(
                    seconds(lambda: (engine.restore(name, snapshot), first_token(engine, name)))  # noqa: B023
                )
            taken[tier] = statistics.median(times)
            if tier == "host":
                engine.check_integrity(600)  # all is written
                engine.shutdown()
                engine = Engine(lm, config)
                begin(engine, "warm", streams[0][: 3 * S])
                first_token(engine, "warm")
        engine.shutdown()
    print(shape.name, "first token, seconds:", taken, flush=True)
    return taken


def begin(engine: Engine, name: str, tokens: list[int]) -> None:
    engine.open(name)
    engine.append(name, tokens)


def first_token(engine: Engine, name: str) -> None:
    generation = Generation(SamplingParams(max_tokens=1), lambda token: False)
    engine.generate(name, generation)
    generation.done.result()


def random_tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 32000, (count,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def measure_batch(shape: Shape) -> dict[int, float]:
    """Tokens a second of many sessions of PEER_TOKENS each, by their number; their pasts are forks of one."""
    stream = Stream(shape)
    stream.run(random_tokens(PEER_TOKENS))
    packed, rates = pack(stream.state), {}
    states: list[State] = []
    pasts: list[SessionPast] = []
    for sessions in SESSIONS:
        while len(states) < sessions:
            states.append(unpack(packed, stream.runner.policy))
            pasts.append(stream.past.fork())
        tokens = torch.full((sessions, 1), 7)

        def step(tokens: Tensor = tokens, sessions: int = sessions) -> None:
            logits_B1V = stream.runner.forward(tokens, states, pasts, width=sessions)
            for state, past, logits_1V in zip(states, pasts, logits_B1V, strict=True):
                stream.runner.arrive(state, past, 1, logits_1V[-1])
            tokens[:, 0] = logits_B1V[:, 0].argmax(dim=-1).cpu()

        step()
        rates[sessions] = sessions / median(step, 20)
        print(shape.name, sessions, "sessions", rates[sessions], "tokens/s", flush=True)
    return rates


@torch.inference_mode()
def measure_peer_batch(shape: Shape) -> dict[int, float]:
    """The same of full attention, as far as its keys and values fit."""
    model = shape.build()
    ids = torch.randint(0, 32000, (1, PEER_TOKENS), device="cuda")
    rates: dict[int, float] = {}
    cache, sessions = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values, 1
    try:
        while True:
            rates[sessions] = sessions / peer_decode(model, ids[:, :1].expand(sessions, 1), cache)
            print(shape.name, "peer", sessions, "sessions", rates[sessions], "tokens/s", flush=True)
            cache.batch_repeat_interleave(2)
            sessions *= 2
    except torch.cuda.OutOfMemoryError:
        return rates


def peer_decode(model: Any, one: Tensor, cache: Any) -> float:
    """Median seconds of a token."""
    return median(lambda: model(input_ids=one, past_key_values=cache, use_cache=True, logits_to_keep=1), 10)


@torch.inference_mode()
def measure_peer(shape: Shape) -> dict[str, Any]:
    model = shape.build()
    ids = torch.randint(0, 32000, (1, PEER_TOKENS), device="cuda")

    def whole() -> Any:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def chunked() -> None:
        cache = None
        for chunk in ids.split(S, dim=1):
            cache = model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    model(input_ids=ids[:, :S], use_cache=True, logits_to_keep=1)
    runs = {"peak_gib": peak_gib(whole), "prefill_s": median(whole, 3)}
    runs["decode_s"] = peer_decode(model, ids[:, :1], whole())
    runs["chunked_peak_gib"] = peak_gib(chunked)
    runs["chunked_prefill_s"] = seconds(chunked)
    print(shape.name, "peer", runs, flush=True)
    return runs


def figures(shape: str, ours: dict[str, Any], peer: dict[str, Any], top: dict[str, float]) -> Iterator[Figure]:
    for length, taken in ours["prefill_s"].items():
        yield f"prefill_{length // 1024}k_{shape}", length / taken, "tokens/s", None, None
        yield f"peak_gib_{length // 1024}k_{shape}", ours["peak_gib"][length], "GiB", None, None
    yield from decode_figures(shape, ours, top)
    n = PEER_TOKENS
    if n in ours["prefill_s"]:
        dense = 2 * ours["weights"] * n / ours["prefill_s"][n] / 1e12 / top["tflops"]
        yield (
            f"prefill_mfu_128k_{shape}",
            dense,
            "of the products' ceiling",
            ">= 0.65" if shape == "llama2_7b" else None,
            None,
        )
        speedup = peer["prefill_s"] / ours["prefill_s"][n]
        yield f"prefill_speedup_128k_{shape}", speedup, "peer / engine", SPEEDUPS[shape], PEER
        chunked = peer["chunked_prefill_s"] / ours["prefill_s"][n]
        yield f"prefill_speedup_128k_{shape}_chunked", chunked, "peer / engine", None, CHUNKED
        yield f"peak_ratio_128k_{shape}", peer["peak_gib"] / ours["peak_gib"][n], "peer / engine", ">= 6.3", PEER
        chunked_peak = peer["chunked_peak_gib"] / ours["peak_gib"][n]
        yield f"peak_ratio_128k_{shape}_chunked", chunked_peak, "peer / engine", None, CHUNKED
        yield f"decode_speedup_128k_{shape}", peer["decode_s"] / ours["decode_s"][n], "peer / engine", ">= 5", PEER
    if {65536, 1048576} <= ours["prefill_s"].keys():
        rates = [length / ours["prefill_s"][length] for length in (65536, 1048576)]
        yield f"prefill_rate_1m_over_64k_{shape}", rates[1] / rates[0], "1m / 64k", ">= 0.9", None
    if {n, 1048576} <= ours["peak_gib"].keys():
        growth = ours["peak_gib"][1048576] / ours["peak_gib"][n] - 1
        yield f"peak_growth_1m_{shape}", growth, "share of that at 128k", "<= 0.01", None


def decode_figures(shape: str, ours: dict[str, Any], top: dict[str, float]) -> Iterator[Figure]:
    taken = ours["decode_s"]
    for length, seconds_each in taken.items():
        yield f"decode_{length // 1024}k_{shape}", seconds_each * 1e3, "ms a token", None, None
    if PEER_TOKENS in taken:
        over = taken[PEER_TOKENS] / (ours["decode_bytes"][PEER_TOKENS] / top["tbps"] / 1e12)
        target = "<= 1.25" if shape == "llama2_7b" else None
        yield f"decode_over_floor_128k_{shape}", over, "of the bytes read at copy speed", target, None
    if {8192, 1048576} <= taken.keys():
        yield f"decode_1m_over_8k_{shape}", taken[1048576] / taken[8192], "1m / 8k", "<= 1.05", None


def batch_figures(shape: str, ours: dict[int, float], peer: dict[int, float]) -> Iterator[Figure]:
    for sessions, rate in ours.items():
        yield f"batch_decode_{sessions}_sessions_128k_{shape}", rate, "tokens/s", None, None
    for sessions, rate in peer.items():
        yield f"batch_decode_{sessions}_sessions_128k_{shape}_peer", rate, "tokens/s", None, PEER
    speedup = max(ours.values()) / max(peer.values())
    yield f"batch_decode_speedup_128k_{shape}", speedup, "engine / peer, best of each", ">= 10", PEER


def restore_figures(shape: str, taken: dict[str, float]) -> Iterator[Figure]:
    for tier in ("host", "disk"):
        share = taken[tier] / taken["recompute"]
        yield f"restore_{tier}_over_recompute", share, f"restored / run again, {shape}, 128k", "<= 0.1", None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=[shape.name for shape in SHAPES])
    parser.add_argument("--tokens", type=int, nargs="*", help="lengths of the prompts")
    parser.add_argument("--decode", action="store_true", help="how long our tokens take, and nothing else")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    top, found, file = ceilings(), [], RESULTS / "raw" / "gpu.json"
    raw = json.loads(file.read_text()) if file.exists() else {}
    print(top, flush=True)
    packages = [name for name in ("flash-attn-4", "flash-attn") if installed(name)]
    for shape in (shape for shape in SHAPES if shape.name in options.shapes):
        ours = alone(measure_ours, shape, tuple(options.tokens or shape.lengths))
        if options.decode:
            found += list(decode_figures(shape.name, ours, top))
            if not options.dry:
                add("gpu", records(f"{COMMAND} --shapes {shape.name} --decode", found, packages))
            continue
        peer = alone(measure_peer, shape)
        raw[shape.name] = {"ours": ours, "peer": peer}
        found += list(figures(shape.name, ours, peer, top))
        if shape.name == BATCHED:
            found += list(batch_figures(shape.name, alone(measure_batch, shape), alone(measure_peer_batch, shape)))
            found += list(restore_figures(shape.name, alone(measure_restore, shape)))
        if not options.dry:  # what was measured stays, whatever comes
            add("gpu", records(COMMAND, found, packages))
            file.write_text(json.dumps(raw | {"ceilings": top}, indent=1) + "\n")
    for figure in found:
        print(*figure)


def alone(measure: Callable[..., T], *args: Any) -> T:
    """Measure, and let go of what it took on the GPU."""
    found = measure(*args)
    torch._dynamo.reset()  # its limit on what it compiles is for a process
    gc.collect()
    torch.cuda.empty_cache()
    return found


def installed(package: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
