"""Training through segments beside Hugging Face's full attention with gradient checkpointing, in the same run.

python -m benchmarks.training                                # on a GPU; adds to results/training.json
python -m benchmarks.training --shape llama31_8b --length 8192 131072 --k 1     # a part of it
python -m benchmarks.training --device cpu --length 1024 4096 --segment 1024 --rounds 1 --dry

A step is one stream: loss, gradients, AdamW; random weights, in bf16 with fp32 masters on a GPU and in fp32 on a CPU;
the settings of benchmarks.gpu.
Ours is `SegmentedTrainer`, for each K asked for. The peer runs the whole stream at once, SDPA's flash kernels, each
layer checkpointed; its cross-entropy is taken in pieces as ours is, for all logits at once would decide its peak.
`smollm2` is trained in full, `llama31_8b` by LoRA of rank 16, which takes peft. Each arm is a process of its own, which
takes the lengths one after the other; a length's peak is what torch allocated on the GPU and what CUDA graphs keep for
themselves, or what the process held at most. Times are medians, after a step that warms up. Figures are kept as soon as
they are known: a run that is interrupted keeps what it has measured, and what a later one measures again replaces it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import gpu
from benchmarks.gpu import SHAPES, Shape
from benchmarks.record import RESULTS, ROOT, Figure, add, records
from segcore.model import CausalLM
from segcore.training.loss import LOGITS
from segcore.training.optimizer import MasterOptimizer
from segcore.training.stream import TrainingStream
from segcore.training.tbptt import SegmentedTrainer

COMMAND = "-m benchmarks.training"
GIB = 2**30
PEER = "Hugging Face, SDPA flash, gradient checkpointing"
TRAINED = {shape.name: shape for shape in SHAPES if shape.name in ("smollm2", "llama31_8b")}
TARGETS = {"train_speedup_128k_smollm2": ">= 2"}
Step = Callable[[Tensor], None]


class Measured(NamedTuple):
    """A step of an arm at a length."""

    length: int
    seconds: float
    peak_gib: float


def build(shape: Shape, device: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**shape.config, max_position_embeddings=2**21)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def adamw(parameters: list[Any]) -> MasterOptimizer:
    return MasterOptimizer(parameters, partial(torch.optim.AdamW, lr=1e-5))


def ours(shape: Shape, options: argparse.Namespace) -> Step:
    lm = CausalLM(build(shape, options.device))
    if shape.name == "smollm2":
        lm.model.requires_grad_(True)
    else:
        from segcore.training.lora import add_lora

        add_lora(lm)
    if options.compile:
        lm.compile()
    (k,) = options.k
    trainer = SegmentedTrainer(
        lm,
        dataclasses.replace(shape.segment(), segment_tokens=options.segment),
        k=k if k == "all" else int(k),
        chunk_tokens=options.segment,
        checkpoint_layers=options.checkpoint,
        host_bytes=96 * GIB,
        attention=options.attention,
    )
    optimizer = adamw(trainer.parameters)

    def step(tokens_T: Tensor) -> None:
        trainer.loss_and_grad(TrainingStream("random", tokens_T), len(tokens_T) - 1)
        optimizer.step()

    return step


def peer(shape: Shape, options: argparse.Namespace) -> Step:
    model = build(shape, options.device)
    if shape.name != "smollm2":
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), model)
        model.enable_input_require_grads()
    # Checkpointing is for models in training; there is no dropout.
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])

    def step(tokens_T: Tensor) -> None:
        tokens_T = tokens_T.to(options.device)
        hidden_TC = model.model(input_ids=tokens_T[None], use_cache=False).last_hidden_state[0, :-1]
        leaf_TC = hidden_TC.detach().requires_grad_()
        rows = LOGITS // shape.config["vocab_size"]
        for piece_nC, targets_n in zip(leaf_TC.split(rows), tokens_T[1:].split(rows), strict=True):
            loss = cross_entropy(model.lm_head(piece_nC).float(), targets_n, reduction="sum")
            (loss / (len(tokens_T) - 1)).backward()
        hidden_TC.backward(leaf_TC.grad)
        optimizer.step()

    return step


def measure(options: argparse.Namespace) -> None:
    """One arm at each length, printed as it is known: a line of JSON on stdout, what is under way on stderr."""
    (name,) = options.shape
    shape, label = TRAINED[name], arm_name(options.one, name, options)
    torch.set_num_threads(options.threads)
    random = torch.Generator().manual_seed(1)
    tokens_T = torch.randint(0, shape.config["vocab_size"], (max(options.length),), generator=random)
    step = (ours if options.one == "ours" else peer)(shape, options)
    warm_up = taken(step, tokens_T[: 8 * options.segment], options.device)  # passes are recorded
    print(f"{label}: warmed up in {warm_up:.1f} s", file=sys.stderr, flush=True)
    for length in sorted(options.length):
        forget_peak(options.device)
        seconds: list[float] = []
        while len(seconds) < options.rounds and (not seconds or sum(seconds) < options.seconds):
            seconds.append(taken(step, tokens_T[:length], options.device))
            print(f"{label}, {length} tokens: {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
        print(json.dumps([length, statistics.median(seconds), peak_bytes(options.device) / GIB]), flush=True)


def taken(step: Step, tokens_T: Tensor, device: str) -> float:
    """Seconds of a step."""
    start = time.perf_counter()
    step(tokens_T)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return gpu.peak_bytes()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def arm_name(arm: str, shape: str, options: argparse.Namespace) -> str:
    return f"{shape} {arm} k={options.k[0]}" if arm == "ours" else f"{shape} {arm}"


def apart(options: argparse.Namespace, arm: str, shape: str, k: str) -> Iterator[Measured]:
    """`measure` in a process of its own, as far as it comes: a length that doesn't fit ends it."""
    flags = [f"--{name}" for name in ("compile", "checkpoint") if getattr(options, name)]
    kept = ("device", "segment", "rounds", "seconds", "threads", "attention")
    values = [part for name in kept for part in (f"--{name}", str(getattr(options, name)))]
    lengths = map(str, options.length)
    command = [sys.executable, *COMMAND.split(), "--one", arm, "--shape", shape, "--k", k, *flags, *values]
    with subprocess.Popen([*command, "--length", *lengths], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("["):
                yield Measured(*json.loads(line))
    if process.returncode:
        print(f"{shape} {arm}: ended with status {process.returncode}", file=sys.stderr, flush=True)


def short(length: int) -> str:
    return str(length) if length % 1024 else f"{length // 1024}k"


class Figures:
    """A shape's figures, as they become known."""

    def __init__(self, shape: str, options: argparse.Namespace) -> None:
        self._shape, self._on_gpu = shape, options.device == "cuda"
        self._ours: dict[str, dict[int, Measured]] = {}
        self._peer: dict[int, Measured] = {}

    def of_peer(self, run: Measured) -> Iterator[Figure]:
        """Of the peer at a length, and of what is already known of ours beside it."""
        self._peer[run.length] = run
        name = f"{short(run.length)}_{self._shape}_peer"
        yield f"train_{name}", run.length / run.seconds, "tokens/s", None, PEER
        yield f"train_peak_gib_{name}", run.peak_gib, "GiB", None, PEER
        for suffix, runs in self._ours.items():
            if run.length in runs:
                yield from self._beside(suffix, runs[run.length])

    def of_ours(self, suffix: str, run: Measured) -> Iterator[Figure]:
        """Of ours at a length. suffix: tells one way of ours from the others, in names."""
        runs = self._ours.setdefault(suffix, {})
        runs[run.length] = run
        name = f"{short(run.length)}_{self._shape}{suffix}"
        yield f"train_{name}", run.length / run.seconds, "tokens/s", None, None
        yield f"train_peak_gib_{name}", run.peak_gib, "GiB", None, None
        if run.length > (least := min(runs)):
            growth = run.peak_gib / runs[least].peak_gib - 1
            yield f"train_peak_growth_{name}", growth, f"share of that at {short(least)}", "<= 0.05", None
        if run.length in self._peer:
            yield from self._beside(suffix, run)

    def _beside(self, suffix: str, run: Measured) -> Iterator[Figure]:
        theirs, name = self._peer[run.length], f"{short(run.length)}_{self._shape}{suffix}"
        target = TARGETS.get(f"train_speedup_{name}") if self._on_gpu else None
        yield f"train_speedup_{name}", theirs.seconds / run.seconds, "peer / ours", target, PEER
        yield f"train_peak_ratio_{name}", theirs.peak_gib / run.peak_gib, "peer / ours", None, PEER


def run(shape: str, options: argparse.Namespace) -> Iterator[list[Figure]]:
    """Ours with the first K, the peer, ours with the other Ks."""
    figures, (first, *others) = Figures(shape, options), options.k
    way = "".join(
        f"_{name}" for name, on in (("checkpointed", options.checkpoint), ("compiled", options.compile)) if on
    )
    for measured in apart(options, "ours", shape, first):
        yield [*figures.of_ours(way if first == "1" else f"_k{first}{way}", measured)]
    if not options.no_peer:
        for measured in apart(options, "peer", shape, first):
            yield [*figures.of_peer(measured)]
    for k in others:
        for measured in apart(options, "ours", shape, k):
            yield [*figures.of_ours(f"_k{k}{way}", measured)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["smollm2", "llama31_8b"], choices=sorted(TRAINED))
    parser.add_argument("--length", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--k", nargs="+", default=["1", "0", "all"], help="K = 1 bears no suffix")
    parser.add_argument("--segment", type=int, default=4096, help="tokens of a segment")
    parser.add_argument("--checkpoint", action="store_true", help="ours keeps the layers' inputs alone")
    parser.add_argument("--compile", action="store_true", help="ours lets torch fuse what stands around attention")
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--attention", default="auto", help="ours; see EngineConfig")
    parser.add_argument("--rounds", type=int, default=3, help="steps at each length, at most")
    parser.add_argument("--seconds", type=float, default=40, help="no further step begins after so long at a length")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the figures")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    parser.add_argument("--one", choices=["ours", "peer"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options)
        return
    command = " ".join([COMMAND, *sys.argv[1:]])
    for shape in options.shape:
        for figures in run(shape, options):
            for figure in figures:
                print(*figure, flush=True)
            if not options.dry:
                topic = "training" if options.device == "cuda" else "training_cpu"
                add(topic, records(command, figures), options.results)


if __name__ == "__main__":
    main()
