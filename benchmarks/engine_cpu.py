"""The engine beside Hugging Face's generate, the same model on the same tokens, in turn, on this machine.

.venv/bin/python -m benchmarks.engine_cpu        # writes benchmarks/results/engine_cpu.json

Every run is a process of its own, so that its peak memory is its own. Peak memory is what the process held at most,
less what it held once the model was loaded: keys, values, states and scratch. The engine keeps past KV on disk, with
the host budget below. Prefill ends when the first token is there. Speeds are medians over the rounds; a ratio is the
median of the rounds' ratios, so that what else runs on the machine meets both sides alike.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import psutil
import torch

import segcore
from benchmarks.record import ROOT, Figure, records, write

COMMAND = "-m benchmarks.engine_cpu"
# Tokens of the prompt, and how often each is run.
LENGTHS = {2048: 5, 8192: 3, 32768: 1}
ANSWER_TOKENS = 33
HOST_BYTES = 256 * 2**20
PEER = "Hugging Face generate, sdpa"


def prompt(encode: Callable[[str], list[int]], tokens: int) -> list[int]:
    """Python's language reference, over and over if need be."""
    text = "\n\n".join(topics.topics.values())
    stream = encode(text)
    return (stream * (tokens // len(stream) + 1))[:tokens]


def run_engine(tokens: int, timeline: list[float]) -> None:
    """Prefill and answer; one time a token, the first entry being the start."""
    model = segcore.load_model(device="cpu")
    stream = prompt(model.tokenizer.encode, tokens)
    with tempfile.TemporaryDirectory() as folder:
        cache = segcore.CacheConfig(host_bytes=HOST_BYTES, directory=Path(folder))
        config = segcore.EngineConfig(segment=segcore.segment_preset(model.name), cache=cache)
        engine = segcore.Engine(model.lm, config)
        warm_up(lambda count: answer(engine, stream[:count], 2, []))
        answer(engine, stream, ANSWER_TOKENS, timeline)
        engine.shutdown()


def answer(engine: segcore.Engine, stream: list[int], count: int, timeline: list[float]) -> None:
    engine.open("session")
    timeline.append(time.perf_counter())
    engine.append("session", stream)
    engine.mark("session")

    def on_token(token: int) -> bool:
        timeline.append(time.perf_counter())
        return False

    asked = segcore.Generation(segcore.SamplingParams(max_tokens=count), on_token)
    engine.generate("session", asked)
    asked.done.result()
    engine.close("session")


def run_peer(tokens: int, timeline: list[float]) -> None:
    """The same by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    from segcore.weights import default_model_directory

    folder = default_model_directory()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    stream = prompt(lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokens)

    class Clock(BaseStreamer):
        """Called with the prompt, then with each token."""

        def put(self, value: torch.Tensor) -> None:
            timeline.append(time.perf_counter())

        def end(self) -> None: ...

    def generate(count: int, length: int, clock: Clock | None) -> None:
        with torch.inference_mode():
            ids = torch.tensor([stream[:length]])
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                streamer=clock,
            )

    warm_up(lambda count: generate(2, count, None))
    generate(ANSWER_TOKENS, tokens, Clock())


def warm_up(run: Callable[[int], None]) -> None:
    """Once through all code, and the yardstick of the peak."""
    run(64)
    global loaded_bytes
    loaded_bytes = psutil.Process().memory_info().rss


ARMS = {"engine": run_engine, "peer": run_peer}
loaded_bytes = 0


def child(arm: str, tokens: int) -> None:
    timeline: list[float] = []
    ARMS[arm](tokens, timeline)
    timeline = timeline[-(ANSWER_TOKENS + 1) :]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    decode = statistics.median(later - earlier for earlier, later in itertools.pairwise(timeline[1:]))
    figures = {"prefill": tokens / (timeline[1] - timeline[0]), "decode": 1 / decode, "peak": peak - loaded_bytes}
    print(json.dumps(figures))


def measure(arm: str, tokens: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine_cpu", "--arm", arm, "--tokens", str(tokens)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare(tokens: int, rounds: int) -> list[Figure]:
    runs = []
    for turn in range(rounds):
        # Who goes first takes turns too.
        order = list(ARMS) if turn % 2 == 0 else list(ARMS)[::-1]
        runs.append({arm: measure(arm, tokens) for arm in order})
        print(tokens, json.dumps(runs[-1]), flush=True)
    name, figures = f"{tokens // 1024}k", []
    for what, unit in (("prefill", "tokens/s"), ("decode", "tokens/s"), ("peak", "MiB")):
        scale = 2**20 if what == "peak" else 1
        for arm in ARMS:
            value = statistics.median(run[arm][what] for run in runs) / scale
            figures.append((f"{what}_{arm}_{name}", value, unit, None, None if arm == "engine" else PEER))
        ratio = statistics.median(run["engine"][what] / run["peer"][what] for run in runs)
        target = "<= 1.0" if what == "peak" and tokens > 2048 else ">= 1.0" if what != "peak" else None
        figures.append((f"{what}_ratio_{name}", ratio, "engine / peer", target, PEER))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=ARMS, help="one run, in this process")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(LENGTHS), help="tokens of the prompt")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    if options.arm:
        child(options.arm, options.tokens[0])
        return
    figures = [figure for tokens in options.tokens for figure in compare(tokens, LENGTHS.get(tokens, 1))]
    for figure in figures:
        print(*figure)
    if not options.dry:
        write("engine_cpu", records(COMMAND, figures))


if __name__ == "__main__":
    main()
