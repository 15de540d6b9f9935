"""Decode by CUDA graphs: what the plain passes give, for every policy, and the same bits whatever the company."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from segcore.config import CacheConfig
from segcore.engine.runner import Runner
from segcore.model import CausalLM
from segcore.pastkv.manager import PastKVManager
from tests.conftest import VOCABULARY
from tests.segcore.test_invariants import MARKS, MATRIX, STREAM


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    return CausalLM(LlamaForCausalLM(config).bfloat16().cuda())


class Stream:
    def __init__(self, runner: Runner) -> None:
        self.runner, self.state = runner, runner.begin()
        self.past = PastKVManager(CacheConfig(), device=runner.model.spec.device).open_stream(runner.policy.layout)

    def prefill(self, tokens_T: torch.Tensor) -> None:
        for piece in tokens_T.split(self.runner.config.segment_tokens):
            self.runner.advance(piece, self.state, self.past)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("policy", MATRIX)
def test_a_graph_computes_what_plain_passes_do(lm, policy, monkeypatch):
    chosen: list[torch.Tensor] = []
    plain, graphed = Stream(Runner(lm, MATRIX[policy])), Stream(Runner(lm, MATRIX[policy]))
    plain.runner._graphs._usable = False
    assert graphed.runner._graphs.usable()
    # In 16 bits close scores may fall either way: one choice serves both.
    monkeypatch.setattr(plain.past, "decide", lambda choose: chosen.append(choose()) or chosen[-1], raising=False)
    monkeypatch.setattr(graphed.past, "decide", lambda choose: chosen.pop(0), raising=False)
    for at, token in enumerate(STREAM):
        if at in MARKS:
            for stream in (plain, graphed):
                stream.runner.mark(stream.state, stream.past)
        want, got = (s.runner.advance(token[None], s.state, s.past).float() for s in (plain, graphed))
        assert not torch.isnan(got).any()
        assert (got - want).norm() < 0.03 * want.norm(), at
    assert graphed.runner._graphs._graphs, "no graph was used"


def test_company_changes_no_bit(lm):
    runner = Runner(lm, MATRIX["segmented"])

    def streams() -> list[Stream]:
        made = [Stream(runner) for _ in range(3)]
        for i, stream in enumerate(made):
            stream.prefill(STREAM[i : i + 21 + 5 * i])
        return made

    def decode(group: list[Stream], tokens: torch.Tensor) -> torch.Tensor:
        logits = runner.forward(tokens[:, None], [s.state for s in group], [s.past for s in group], width=4)
        for stream, row in zip(group, logits, strict=True):
            runner.arrive(stream.state, stream.past, 1, row[-1])
        return logits

    together, alone = streams(), streams()
    for tokens in STREAM[:60].view(-1, 3):
        want = torch.cat([decode([stream], token[None]) for stream, token in zip(alone, tokens, strict=True)])
        assert torch.equal(decode(together, tokens), want)
