"""What a model's state takes: the formulas of `segcore.memory` with their numbers, checked against a real engine."""

from __future__ import annotations

import gc
import sys
import tempfile
from array import array
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from pydantic import ValidationError

from segcore.config import GIB, CacheConfig, EngineConfig, RetrievalConfig, SegmentedConfig
from segcore.engine.engine import Engine
from segcore.errors import ConfigError
from segcore.memory import Line, Place, Unit, grows, lines, total
from segcore.model import CausalLM, ModelSpec
from segcore.policies import make_policy
from segcore.presets import DEFAULT_MODEL
from segcore.weights import DTYPES, load_model
from services.serving.config import ServeConfig

TOLERANCE = 0.05
WAIT_S = 600.0
ENOUGH = 2**50
# Where tensors are found, and the places of the formulas that are there; on a CPU, device and host are one memory.
PLACES: dict[str, set[Place]] = {"memory": {"device", "host"}, "device": {"device"}, "host": {"host"}}
# Formulas, how many of each unit, and 1 or -1.
Term = tuple[list[Line], dict[Unit, int], int]


@dataclass(frozen=True)
class Shape:
    """A model on paper. parameters: how many numbers."""

    layers: int
    kv_heads: int
    queries_per_kv_head: int
    head_dim: int
    vocabulary: int
    max_positions: int
    parameters: int

    def spec(self, dtype: torch.dtype) -> ModelSpec:
        return ModelSpec(
            architecture="LlamaForCausalLM",
            layers=self.layers,
            kv_heads=self.kv_heads,
            queries_per_kv_head=self.queries_per_kv_head,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            vocabulary=self.vocabulary,
            max_positions=self.max_positions,
            dtype=dtype,
            device=torch.device("cpu"),
        )


SHAPES = {
    DEFAULT_MODEL: Shape(30, 3, 3, 64, 49_152, 8_192, 134_515_008),
    "llama-3.1-8b": Shape(32, 8, 4, 128, 128_256, 131_072, 8_030_261_248),
    "llama-2-7b": Shape(32, 32, 1, 128, 32_000, 4_096, 6_738_415_616),
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Something measured, and what the formulas say: `expected` bytes, of which `slack` are an upper limit."""

    name: str
    measured: float
    expected: float
    slack: float

    @property
    def deviation(self) -> float:
        """How far outside of what the formulas allow, as a share of it."""
        nearest = min(max(self.measured, self.expected - self.slack), self.expected)
        return (self.measured - nearest) / nearest if nearest else float(self.measured != 0)

    @property
    def ok(self) -> bool:
        return abs(self.deviation) <= TOLERANCE


def memory(model: str, dtype: str | None, segment: str | None, *, sessions: int, tokens: int, check: bool) -> int:
    """Print formulas, totals and the check; the command's exit status. Raises ConfigError, NotFound."""
    config, shape = engine_config(model, segment), SHAPES.get(model)
    if shape is not None and (not check or model != DEFAULT_MODEL):
        _require_selectors(config)
        spec = shape.spec(_dtype(dtype))
        print("\n".join(table(model, spec, shape.parameters, config, sessions=sessions, tokens=tokens)))
        if check:
            print(f"\nOf {model} only the shape is known here, so nothing is measured; name a directory to have it so.")
        return 0
    before = tensor_bytes()
    lm = load_model(model, dtype=dtype or "auto").lm
    weights = tensor_bytes() - before
    make_policy(config.segment, lm.spec, lm.rope)  # refuses what an engine would refuse
    print("\n".join(table(model, lm.spec, lm.parameters, config, sessions=sessions, tokens=tokens)))
    return report(measure(lm, config, weights)) if check else 0


def engine_config(model: str, segment: str | None) -> EngineConfig:
    """The service's settings for a model, with `segment`, "policy=NAME,option=value", in place of its preset's."""
    try:
        options = yaml.safe_load("{" + (segment or "").replace("=", ": ") + "}")
        return ServeConfig(model=model, segment=options).engine_config()
    except (yaml.YAMLError, ValidationError, TypeError) as error:
        raise ConfigError(f"--segment {segment!r} must read policy=NAME,option=value,...") from error


def table(
    model: str, spec: ModelSpec, parameters: int, config: EngineConfig, *, sessions: int, tokens: int
) -> list[str]:
    """The formulas and the totals, as lines of text."""
    formulas = lines(spec, parameters, config, tokens)
    width, middle = (max(len(getattr(line, key)) for line in formulas) for key in ("name", "formula"))
    dtype, segment = str(spec.dtype).removeprefix("torch."), config.segment
    text = [
        f"{model}, {dtype}, policy {segment.policy}: L={spec.layers} H={spec.kv_heads} G={spec.queries_per_kv_head}"
        f" d={spec.head_dim} b={spec.dtype.itemsize} V={spec.vocabulary} S={segment.segment_tokens}"
        f" C={config.chunk_tokens} T={tokens}",
        "",
    ]
    for line in formulas:
        size = f"{line.bytes:,.4g}" if line.bytes < 100 else f"{line.bytes:,.0f}"
        sign = "<=" if line.at_most else "  "
        text.append(f"{line.name:{width}}  {line.formula:{middle}}  {sign}{size:>15}  {line.place} per {line.unit}")
    text += ["", f"{sessions} x {tokens:,} tokens, at most:"]
    for place, taken in total(formulas, config, sessions=sessions, tokens=tokens).items():
        if taken:
            text.append(f"  {place:6} {taken:>22,} bytes {taken / GIB:>10,.2f} GiB")
    if any(line.part == "past" for line in formulas):
        text.append(
            f"  Of past KV, no more than host_bytes ({config.cache.host_bytes / GIB:.4g} GiB) is in host memory."
        )
    if grows(spec, segment):
        text.append("  The state grows with its stream: slots aren't of one size.")
        if tokens > spec.max_positions:
            text.append(f"  With this policy a stream ends where the model's positions do, at {spec.max_positions:,}.")
    return text


def measure(lm: CausalLM, config: EngineConfig, weights: int) -> Iterator[Figure]:
    """Run an engine over some segments of random tokens; what it allocates, beside what the formulas say.

    weights: bytes of tensors that loading the model brought.
    """
    made_once = [line for line in lines(lm.spec, lm.parameters, config, 0) if line.name in ("weights", "rotations")]
    yield _figure("weights", weights, {"device"}, (made_once, {"engine": 1}, 1))
    with tempfile.TemporaryDirectory(prefix="segcore-memory-") as folder:
        # No reuse: what an ended stream leaves would hide what the next one takes. One slot: others are parked.
        cache = CacheConfig(host_bytes=ENOUGH, directory=Path(folder), reuse=False)
        gc.collect()
        gc.freeze()  # what there is already isn't walked again and again
        engine = Engine(lm, replace(config, slots=1, cache=cache))
        try:
            yield from _sessions(_Trial(engine, lm, Path(folder)))
        finally:
            gc.unfreeze()
            engine.shutdown()


def report(figures: Iterable[Figure]) -> int:
    """Print figures as they come; 1 if one deviates."""
    print("\nMeasured in an engine that runs random tokens, from live tensors, arrays and files:\n", flush=True)
    print(f"{'':44}{'measured':>14}{'formula':>14}{'deviation':>11}")
    wrong = []
    for figure in figures:
        least = f"  (from {figure.expected - figure.slack:,.0f})" if figure.slack else ""
        print(
            f"{figure.name:44}{figure.measured:>14,.0f}{figure.expected:>14,.0f}{figure.deviation:>+11.2%}{least}",
            flush=True,
        )
        if not figure.ok:
            wrong.append(figure.name)
    if wrong:
        print(f"segcore: more than {TOLERANCE:.0%} off its formula: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


def tensor_bytes(device: str | None = None) -> int:
    """Bytes of the storages of all live tensors, each once; on devices of one type, or on all."""
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and (device is None or thing.device.type == device):
            if thing.is_mkldnn:  # a packed weight, that has no storage to ask
                sizes[thing.device, id(thing)] = thing.numel() * thing.dtype.itemsize
                continue
            storage = thing.untyped_storage()
            sizes[thing.device, storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


class _Trial:
    """An engine whose allocations are watched from outside."""

    def __init__(self, engine: Engine, lm: CausalLM, folder: Path) -> None:
        self.engine, self.spec, self.parameters, self._folder = engine, lm.spec, lm.parameters, folder
        self.segment = engine.config.segment
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(0, lm.spec.vocabulary, (1 << 16,), generator=generator).tolist()

    def run(self, session: str, first: int, stop: int) -> None:
        """Run tokens [first, stop) of a random stream, and wait until all is at rest and written."""
        self.engine.append(session, self._tokens[first:stop])
        self.engine.flush(session).result(WAIT_S)
        self.engine.check_integrity(WAIT_S)

    def lines(self, tokens: int, *parts: str) -> list[Line]:
        return [line for line in lines(self.spec, self.parameters, self.engine.config, tokens) if line.part in parts]

    def held(self) -> dict[str, int]:
        """Bytes of tensors, by where they are."""
        if self.spec.device.type == "cpu":
            return {"memory": tensor_bytes("cpu")}
        torch.cuda.synchronize(self.spec.device)
        return {"device": torch.cuda.memory_allocated(self.spec.device), "host": tensor_bytes("cpu")}

    def rises(self, name: str, before: dict[str, int], *terms: Term) -> Iterator[Figure]:
        """What is held more than before, by where it is, beside what the formulas say."""
        for where, size in self.held().items():
            yield _figure(f"{name}, {where}", size - before[where], PLACES[where], *terms)

    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._folder.rglob("*.safetensors"))


def _sessions(trial: _Trial) -> Iterator[Figure]:
    """A session in its slot, its closed segments in every tier, its journal; then parked, then forked."""
    size = trial.segment.segment_tokens
    short, long = -(-size // 2), 2 * size + -(-size // 2)
    trial.engine.open("first")  # leaves what is made once: rotations, workspaces
    trial.run("first", 0, long)
    trial.engine.close("first")
    empty, arrays = trial.held(), _array_bytes()
    trial.engine.open("a")
    trial.run("a", 0, short)
    young: Term = (trial.lines(short, "state"), {"slot": 1, "token in a slot": short, "session": 1}, 1)
    yield from trial.rises("a state in its slot", empty, young)

    opened = trial.held()
    trial.run("a", short, long)
    old: Term = (trial.lines(long, "state"), {"slot": 1, "token in a slot": long, "session": 1}, 1)
    counts: dict[Unit, int] = {"closed token": 2 * size, "segment": 2, "token": long, "session": 1}
    past: Term = (trial.lines(long, "past"), counts, 1)
    yield from trial.rises("two closed segments", opened, old, _less(young), past)
    yield _figure("two closed segments, disk", trial.file_bytes(), {"disk"}, past)
    journal = _array_bytes() - arrays
    yield _figure("a journal, host", journal, {"host"}, (trial.lines(long, "journal"), counts, 1))

    full = trial.held()
    trial.engine.open("b")
    trial.run("b", 0, short)  # takes the slot
    parked: Term = (old[0], {"parked session": 1, "session": 1}, 1)
    yield from trial.rises("a parked state, another in its slot", full, parked, young, _less(old))
    full = trial.held()
    trial.engine.fork("a", "c")
    # On a CPU the logits of both are the same memory.
    own: dict[Unit, int] = {"fork": 1} if "memory" in full else {"fork": 1, "session": 1}
    yield from trial.rises("a fork", full, (old[0], own, 1))


def _less(term: Term) -> Term:
    return term[0], term[1], -term[2]


def _figure(name: str, measured: int, places: Container[Place], *terms: Term) -> Figure:
    """`measured` beside the formulas' sum over the lines of some places."""
    expected, slack = 0.0, 0.0
    for formulas, counts, sign in terms:
        for line in formulas:
            if line.place in places:
                size = sign * line.bytes * counts.get(line.unit, 0)
                expected += size
                slack += size if line.at_most else 0
    return Figure(name=name, measured=measured, expected=expected, slack=slack)


def _array_bytes() -> int:
    gc.collect()
    return sum(sys.getsizeof(thing) - sys.getsizeof(array("i")) for thing in gc.get_objects() if type(thing) is array)


def _dtype(name: str | None) -> torch.dtype:
    name = "bfloat16" if name in (None, "auto") else name
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} must be 'auto' or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _require_selectors(config: EngineConfig) -> None:
    """On paper, too, retrieval has a price only once it is known how many cells choose."""
    segment = config.segment
    own = isinstance(segment, SegmentedConfig) and segment.selection == "cell"
    if isinstance(segment, RetrievalConfig) and segment.retrieved_tokens and not segment.selectors and not own:
        raise ConfigError(
            f"policy {segment.policy!r} needs selector cells; on paper it matters how many, not which: --segment"
            " selectors=[[0,0],[0,1]]"
        )
