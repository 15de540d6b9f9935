"""Passes by CUDA graphs: as near to fp32 as plain ones, for every policy, and the same bits whatever the company."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from segcore.config import CacheConfig, SegmentConfig
from segcore.engine.runner import Runner
from segcore.model import CausalLM
from segcore.pastkv.manager import PastKVManager
from segcore.policies import POLICIES
from tests.conftest import VOCABULARY
from tests.segcore.test_invariants import MARKS, MATRIX, STREAM

# What whole segments are passed for: policies of sinks, retrieved tokens and a tail, segments no shorter than those.
WHOLE = {
    name: dataclasses.replace(config, segment_tokens=48)
    for name, config in MATRIX.items()
    if getattr(POLICIES[config.policy], "by_ends", False) and config.refresh_points is None
}


def make_lm(dtype: torch.dtype) -> CausalLM:
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
    return CausalLM(LlamaForCausalLM(config).bfloat16().to(dtype).cuda())


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    return make_lm(torch.bfloat16)


@pytest.fixture(scope="module")
def exact_lm() -> CausalLM:
    """The same weights in fp32."""
    return make_lm(torch.float32)


class Stream:
    def __init__(self, lm: CausalLM, config: SegmentConfig, *, graphs: bool = True) -> None:
        self.runner = Runner(lm, config)
        if not graphs:
            self.runner._decode._usable = self.runner._wholes._usable = False
        self.state = self.runner.begin()
        self.past = PastKVManager(CacheConfig(), device=lm.spec.device).open_stream(self.runner.policy.layout)

    def run(self, tokens_T: torch.Tensor) -> torch.Tensor:
        return self.runner.advance(tokens_T, self.state, self.past)[-1].float()


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def compare(streams: list[Stream], pieces: list[torch.Tensor], marks: tuple[int, ...], monkeypatch) -> None:
    """Run streams side by side, the first of which is exact: the last must be as near to it as the second."""
    # In 16 bits close scores may fall either way: one choice serves all.
    chosen: list[list[torch.Tensor]] = [[] for _ in streams]

    def choose_for_all(choose):
        choice = choose()
        for others in chosen[1:]:
            others.append(choice)
        return choice

    monkeypatch.setattr(streams[0].past, "decide", choose_for_all)
    for stream, queue in zip(streams[1:], chosen[1:], strict=True):
        monkeypatch.setattr(stream.past, "decide", lambda choose, queue=queue: queue.pop(0))
    errors = [0.0 for _ in streams]
    for piece in pieces:
        if streams[0].state.length in marks:
            for stream in streams:
                stream.runner.mark(stream.state, stream.past)
        exact, *rough = (stream.run(piece) for stream in streams)
        for i, logits in enumerate(rough, 1):
            assert not torch.isnan(logits).any()
            errors[i] += float((logits - exact).norm() / exact.norm()) / len(pieces)
    assert errors[2] < 1.5 * errors[1] + 1e-3, errors
    assert errors[1] < 0.2, errors


@pytest.mark.parametrize("policy", MATRIX)
def test_decode_by_graphs_is_as_near_to_the_truth_as_plain_passes(exact_lm, lm, policy, monkeypatch):
    config = MATRIX[policy]
    streams = [Stream(exact_lm, config, graphs=False), Stream(lm, config, graphs=False), Stream(lm, config)]
    compare(streams, list(STREAM.split(1)), MARKS, monkeypatch)
    assert streams[2].runner._decode._graphs, "no graph was used"


@pytest.mark.parametrize("policy", WHOLE)
def test_whole_segments_are_as_near_to_the_truth_as_plain_passes(exact_lm, lm, policy, monkeypatch):
    config = WHOLE[policy]
    streams = [Stream(exact_lm, config, graphs=False), Stream(lm, config, graphs=False), Stream(lm, config)]
    tokens = STREAM.repeat(6)[: 15 * config.segment_tokens + 5]
    compare(streams, list(tokens.split(config.segment_tokens)), (), monkeypatch)
    assert streams[2].runner._wholes._pass._graphs[False], "no graph was used"


@pytest.mark.parametrize("policy", WHOLE)
def test_whole_segments_leave_what_plain_passes_leave(lm, policy, monkeypatch):
    """In the first layer, whose inputs are the same to the last bit."""
    config = WHOLE[policy]
    plain, whole = Stream(lm, config, graphs=False), Stream(lm, config)
    choices: list[torch.Tensor] = []
    monkeypatch.setattr(plain.past, "decide", lambda choose: choices.append(choose()) or choices[-1])
    monkeypatch.setattr(whole.past, "decide", lambda choose: choices.pop())
    for i, tokens in enumerate(STREAM.repeat(6)[: 9 * config.segment_tokens].split(config.segment_tokens)):
        plain.run(tokens)
        whole.run(tokens)
        for ours, theirs in zip(whole.state.layers[0], plain.state.layers[0], strict=True):
            assert (ours.start, ours.base, ours.position) == (theirs.start, theirs.base, theirs.position), i
            rows = slice(ours.start, ours.base)
            assert torch.equal(ours.k_HND[:, rows], theirs.k_HND[:, rows]), i
            assert torch.equal(ours.v_HND[:, rows], theirs.v_HND[:, rows]), i
            torch.testing.assert_close(ours.rotated_HND[:, rows], theirs.rotated_HND[:, rows], rtol=0.02, atol=0.02)
    if plain.past.segments:
        positions = torch.arange(9 * config.segment_tokens)
        first_layer = [i for i, cell in enumerate(whole.runner.policy.readers) if cell.layer == 0]
        whole.past.await_transfer()
        assert not any(bulk.is_cuda for bulk in whole.past.within_reach()), "a block stayed on the device"
        kept = [stream.past.gather(positions)[:, first_layer] for stream in (plain, whole)]
        assert torch.equal(*kept)


def test_streams_take_turns_in_one_graph(lm):
    config = WHOLE["segmented"]
    tokens = STREAM.repeat(6)[: 8 * config.segment_tokens].split(config.segment_tokens)
    alone, first, second = Stream(lm, config), Stream(lm, config), Stream(lm, config)
    second.runner = first.runner
    want = [alone.run(piece) for piece in tokens]
    for i, piece in enumerate(tokens):
        assert torch.equal(first.run(piece), want[i]), i
        second.run(piece.flip(0))


def test_windows_grow_behind_whole_segments(lm, exact_lm, monkeypatch):
    config = WHOLE["segmented"]
    streams = [Stream(exact_lm, config, graphs=False), Stream(lm, config, graphs=False), Stream(lm, config)]
    tokens, size = STREAM.repeat(6), config.segment_tokens
    pieces = [*tokens[: 2 * size].split(size), *tokens[2 * size :][:20].split(1), tokens[2 * size + 20 : 3 * size]]
    compare(streams, [*pieces, *tokens[3 * size : 5 * size].split(size)], (2 * size + 10,), monkeypatch)


def test_company_changes_no_bit(lm):
    runner = Runner(lm, MATRIX["segmented"])

    def streams() -> list[Stream]:
        made = [Stream(lm, MATRIX["segmented"]) for _ in range(3)]
        for i, stream in enumerate(made):
            stream.runner = runner
            for piece in STREAM[i : i + 21 + 5 * i].split(runner.config.segment_tokens):
                stream.run(piece)
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
