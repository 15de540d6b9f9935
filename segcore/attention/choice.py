"""Which attention runs: the quickest of those that are right, measured on the device, once a process and shape."""

from __future__ import annotations

import functools
import logging
import statistics

import torch
from torch import Tensor

from segcore.attention.base import Attention
from segcore.attention.flash import flash_attentions
from segcore.attention.reference import reference_attention
from segcore.attention.sdpa import sdpa_attention
from segcore.errors import ConfigError
from segcore.model import ModelSpec

log = logging.getLogger(__name__)

# Relative error against fp64 within which 16-bit attention is right; it ends near 0.0025.
TOLERANCE = 0.01
TRIALS = 10


def make_attention(name: str, spec: ModelSpec, tokens: int, keys: int) -> Attention:
    """The attention of that name; "auto": for passes of one token and for longer ones, what is quickest.

    tokens, keys: of a long pass. Raises ConfigError for a name that isn't there.
    """
    there = backends(spec)
    if name == "auto":
        return _quickest(spec, tokens, keys)
    if name not in there:
        raise ConfigError(f"attention={name!r} isn't there; choose 'auto' or one of {', '.join(sorted(there))}")
    return there[name]


def backends(spec: ModelSpec) -> dict[str, Attention]:
    """What can run on this device in this precision."""
    there: dict[str, Attention] = {"reference": reference_attention, "sdpa": sdpa_attention}
    if spec.device.type == "cuda" and spec.dtype in (torch.bfloat16, torch.float16):
        there |= flash_attentions()
    return there


@functools.cache
def _quickest(spec: ModelSpec, tokens: int, keys: int) -> Attention:
    candidates = {name: attention for name, attention in backends(spec).items() if name != "reference"}
    if len(candidates) == 1:
        return sdpa_attention
    long, one = (_measured(candidates, spec, count, keys) for count in (tokens, 1))

    def attention(q_HGTD: Tensor, k_HND: Tensor, v_HND: Tensor, scale: float) -> Tensor:
        return (one if q_HGTD.shape[2] == 1 else long)(q_HGTD, k_HND, v_HND, scale)

    return attention


def _measured(candidates: dict[str, Attention], spec: ModelSpec, tokens: int, keys: int) -> Attention:
    """The quickest that is right."""
    times: dict[str, float] = {}
    for name, attention in candidates.items():
        try:
            error = relative_error(attention, spec, min(tokens, 256), min(keys, 300))
            if error <= TOLERANCE:  # not if it is NaN
                times[name] = _milliseconds(attention, spec, tokens, keys)
            else:
                log.warning("attention %s is left out: its error is %.3g", name, error)
        except Exception as failure:  # another's code, on shapes that it may not know
            log.warning("attention %s is left out: %s", name, failure)
    best = min(times, key=times.__getitem__)
    measured = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
    log.info("attention of %d tokens to %d keys: %s (%s)", tokens, keys, best, measured)
    return candidates[best]


def relative_error(attention: Attention, spec: ModelSpec, tokens: int, keys: int) -> float:
    """Against the fp64 oracle, on fresh random inputs: the norm of the difference by the norm of the result."""
    q, k, v = _inputs(spec, tokens, max(tokens, keys))
    want = reference_attention(q.double(), k.double(), v.double(), spec.scale)
    return float((attention(q, k, v, spec.scale).double() - want).norm() / want.norm())


def _milliseconds(attention: Attention, spec: ModelSpec, tokens: int, keys: int) -> float:
    q, k, v = _inputs(spec, tokens, max(tokens, keys))
    times: list[float] = []
    for _ in range(TRIALS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        attention(q, k, v, spec.scale)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def _inputs(spec: ModelSpec, tokens: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=spec.device, dtype=spec.dtype)

    kv = (spec.kv_heads, keys, spec.head_dim)
    return random(spec.kv_heads, spec.queries_per_kv_head, tokens, spec.head_dim), random(*kv), random(*kv)
