"""Training through segments beside Hugging Face's full attention with gradient checkpointing, in the same run.

python -m benchmarks.training                                    # on a GPU; writes results/training.json
python -m benchmarks.training --device cpu --lengths 1024 4096 --segment 1024 --rounds 1 --dry

A step is one stream: loss, gradients, AdamW; random weights, in bf16 with fp32 masters on a GPU and in fp32 on a CPU;
the settings of benchmarks.gpu.
Ours is `SegmentedTrainer`, for each K asked for. The peer runs the whole stream at once, SDPA's flash kernels, each
layer checkpointed; its cross-entropy is taken in pieces as ours is, for all logits at once would decide its peak.
`smollm2` is trained in full, `llama31_8b` by LoRA of rank 16, which takes peft. Every measurement is a process of its
own; its peak is what torch allocated on the GPU, or what the process held at most. Times are medians, after a step that
warms up.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.gpu import SHAPES, Shape
from benchmarks.record import ROOT, Figure, records, write
from segcore.model import CausalLM
from segcore.training.loss import LOGITS
from segcore.training.optimizer import MasterOptimizer
from segcore.training.stream import TrainingStream
from segcore.training.tbptt import SegmentedTrainer

COMMAND = "-m benchmarks.training"
GIB = 2**30
PEER = "Hugging Face, SDPA flash, gradient checkpointing"
TRAINED = {shape.name: shape for shape in SHAPES if shape.name in ("smollm2", "llama31_8b")}
TARGETS = {"smollm2": ">= 2"}
Step = Callable[[Tensor], None]


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
    trainer = SegmentedTrainer(
        lm,
        dataclasses.replace(shape.segment(), segment_tokens=options.segment),
        k=options.k if options.k == "all" else int(options.k),
        chunk_tokens=options.segment,
        checkpoint_layers=options.checkpoint,
        host_bytes=96 * GIB,
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


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One arm at one length: seconds of a step, and the peak."""
    cuda, shape = options.device == "cuda", TRAINED[options.shapes[0]]
    torch.set_num_threads(options.threads)
    (length,) = options.lengths
    random = torch.Generator().manual_seed(1)
    tokens_T = torch.randint(0, shape.config["vocab_size"], (length,), generator=random)
    step = (ours if options.one == "ours" else peer)(shape, options)
    step(tokens_T[: 3 * options.segment])
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        step(tokens_T)
        if cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    held = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(taken), "peak_gib": held / GIB}


def apart(options: argparse.Namespace, arm: str, shape: str, length: int, k: str) -> dict[str, float] | None:
    """`measure` in a process of its own; None if it failed, for want of memory as a rule."""
    flags = [f"--{name}" for name in ("compile", "checkpoint") if getattr(options, name)]
    values = {
        "device": options.device,
        "segment": options.segment,
        "rounds": options.rounds,
        "threads": options.threads,
    }
    command = [sys.executable, *COMMAND.split(), "--one", arm, "--shapes", shape, "--lengths", str(length), "--k", k]
    command += [*flags, *(str(part) for name, value in values.items() for part in (f"--{name}", value))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    label = f"{shape} {length} {arm}{f' k={k}' if arm == 'ours' else ''}"
    if done.returncode:
        print(f"{label}: failed, {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return None
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{label}: {length / found['seconds']:,.0f} tokens/s, {found['peak_gib']:.2f} GiB", flush=True)
    return found


def figures(
    shape: str, k: str, ours: dict[int, Any], peer: dict[int, Any], options: argparse.Namespace
) -> Iterator[Figure]:
    """k: its suffix, "" for the first. ours, peer: by length."""
    for length, run in ours.items():
        name = f"{length // 1024}k_{shape}{k}"
        yield f"train_{name}", length / run["seconds"], "tokens/s", None, None
        yield f"train_peak_gib_{name}", run["peak_gib"], "GiB", None, None
        if length in peer:
            target = TARGETS.get(shape) if (length, k) == (131072, "") and options.device == "cuda" else None
            speedup = peer[length]["seconds"] / run["seconds"]
            yield f"train_speedup_{name}", speedup, "peer / ours", target, PEER
            yield f"train_peak_ratio_{name}", peer[length]["peak_gib"] / run["peak_gib"], "peer / ours", None, PEER
    if len(ours) > 1:
        least, most = min(ours), max(ours)
        growth = ours[most]["peak_gib"] / ours[least]["peak_gib"] - 1
        name = f"train_peak_growth_{most // 1024}k_{shape}{k}"
        yield name, growth, f"share of that at {least // 1024}k", "<= 0.05", None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["smollm2"], choices=sorted(TRAINED))
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--k", nargs="*", default=["1", "0", "all"], help="the first one's figures bear no suffix")
    parser.add_argument("--segment", type=int, default=4096, help="tokens of a segment")
    parser.add_argument("--checkpoint", action="store_true", help="ours keeps the layers' inputs alone")
    parser.add_argument("--compile", action="store_true", help="ours lets torch fuse what stands around attention")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    parser.add_argument("--one", choices=["ours", "peer"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        options.k = options.k[0]
        print(json.dumps(measure(options)))
        return
    found: list[Figure] = []
    for shape in options.shapes:
        theirs = {n: run for n in options.lengths if (run := apart(options, "peer", shape, n, "1"))}
        for k in options.k:
            runs = {n: run for n in options.lengths if (run := apart(options, "ours", shape, n, k))}
            found += figures(shape, "" if k == options.k[0] else f"_k{k}", runs, theirs, options)
    for figure in found:
        print(*figure)
    if not options.dry:
        topic = "training" if options.device == "cuda" else "training_cpu"
        write(topic, records(" ".join([COMMAND, *sys.argv[1:]]), found))


if __name__ == "__main__":
    main()
