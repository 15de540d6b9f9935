"""A plain loop over F, which the engine is held against."""

from __future__ import annotations

import torch

from segcore.config import CacheConfig
from segcore.engine.runner import Runner
from segcore.engine.sampler import sample
from segcore.model import CausalLM
from segcore.pastkv.manager import PastKVManager
from segcore.sampling import SamplingParams
from segcore.segments import tokens_to_next_cut
from tests.conftest import tiny_segment

BLOCK_BYTES = 16 * 4 * 2 * 8 * 8  # tokens x cells x (keys, values) x dimensions x fp64


def by_hand(lm: CausalLM, stream: list[int], count: int, marks: tuple[int, ...] = (), **params: object) -> list[int]:
    """The same answer by a plain loop: the stream, in passes that end at marks too, then token by token."""
    config, sampling = tiny_segment(), SamplingParams(**params)  # type: ignore[arg-type]
    runner = Runner(lm, config)
    state, past = runner.begin(), PastKVManager(CacheConfig()).open_stream(runner.policy.layout)
    tokens: list[int] = []
    with torch.inference_mode():
        for end in (*marks, len(stream)):
            while state.length < end:
                step = min(tokens_to_next_cut(state.filled, config, 8), end - state.length)
                logits = runner.advance(torch.tensor(stream[state.length : state.length + step]), state, past)
            if end in marks:
                runner.mark(state, past)
        while True:
            tokens.append(sample(logits[-1], sampling, len(tokens)))
            if len(tokens) == count:
                return tokens
            logits = runner.advance(torch.tensor(tokens[-1:]), state, past)
