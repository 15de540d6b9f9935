"""Selectors that learn what to look for: their loss, its gradient, and that what was trained is what serves."""

from __future__ import annotations

from dataclasses import astuple
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import segcore
from segcore.config import Cell, EngineConfig, SegmentedConfig
from segcore.engine.engine import Engine
from segcore.errors import BlockMismatch, ConfigError, InvalidInput
from segcore.model import CausalLM
from segcore.policies.segmented import SegmentedPolicy
from segcore.retrieval.query_maps import QueryMaps
from segcore.training import passes
from segcore.training.lora import add_lora, load_adapter, save_adapter
from segcore.training.optimizer import MasterOptimizer
from segcore.training.selectors import Spans, attention_mass, choice_points, lessons_by_attention, lessons_of
from segcore.training.stream import IGNORED, TrainingStream
from segcore.training.tbptt import SegmentedTrainer
from tests.conftest import tiny_model, tiny_segment
from tests.segcore.played import play_recordings
from tests.segcore.test_invariants import STREAM
from tests.segcore.unrolled import Serving

SEGMENT = tiny_segment()
# Sinks 0, 1; before 48 a tail of 44..47, before 64 one of 60..63.
NEEDED = {53: ((20, 24), (30, 31), (40, 46)), 64: ((5, 9),), 70: ((61, 64), (66, 69)), 20: ((0, 3), (2, 4))}
STREAM_WITH_LABELS = TrainingStream("labelled", STREAM[:90], marks=(20, 53, 64, 70), needed=NEEDED)


def with_maps(lm: CausalLM, scale: float = 0.0, cells: tuple[Cell, ...] = SEGMENT.selectors) -> CausalLM:
    """A model whose selectors look elsewhere than their cells, by `scale`."""
    lm.query_maps = QueryMaps(cells, lm.spec)
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(lm.query_maps.change_CGDD.shape, generator=generator, dtype=torch.float64)
    lm.query_maps.change_CGDD.data += scale * noise
    return lm


@pytest.fixture
def lm() -> CausalLM:
    return with_maps(CausalLM(tiny_model()), 0.5)


def policy_of(lm: CausalLM, config: SegmentedConfig = SEGMENT) -> SegmentedPolicy:
    policy = SegmentedPolicy(config, lm.spec, lm.rope)
    if lm.query_maps is not None:
        policy.look_by(lm.query_maps)
    return policy


def literal_scores(lm: CausalLM, serving: Serving, at: int) -> tuple[Tensor, list[int]]:
    """Run the stream to `at` and take the choice; the scores of all past tokens, with gradient, and what was chosen."""
    with torch.no_grad():
        while serving.state.length < at:
            serving.step()
        if at in serving.stream.marks:
            serving.runner.mark(serving.state, serving.past)
    state, keys_CND = serving.state, torch.cat(list(serving.past.search.keys(1)), dim=1)
    scores_N = torch.zeros(keys_CND.shape[1], dtype=torch.float64)
    for cell in range(len(state.queries)):
        for head in range(lm.spec.queries_per_kv_head):
            q_WD = state.queries[cell][head]
            q_WD = q_WD + q_WD @ lm.query_maps.change_CGDD[cell, head]
            scores_N = scores_N + (q_WD @ keys_CND[cell].T).amax(dim=0) * lm.spec.head_dim**-0.5
    return scores_N, state.retrieved_CR[0].tolist()


@pytest.mark.parametrize("k", [0, 1, "all"])
@pytest.mark.parametrize("index", ["exhaustive", "lowrank"])
def test_the_loss_and_its_gradient_are_those_of_the_scores_that_choose(lm, k, index, monkeypatch):
    monkeypatch.setattr("segcore.retrieval.base._SCRATCH_NUMBERS", {"cpu": 1})  # a segment at a time
    config = tiny_segment(index=index)
    trainer = SegmentedTrainer(lm, config, k=k, selector_weight=0.5)
    loss = trainer.loss_and_grad(STREAM_WITH_LABELS, 100, choices=7)
    ours = lm.query_maps.change_CGDD.grad.clone()
    # Of the candidates, [2, 44) at 53 and [2, 60) at 64 and 70, and [2, 12) at 20.
    inside = {20: [(2, 3), (2, 4)], 53: [(20, 24), (30, 31), (40, 44)], 64: [(5, 9)]}
    assert lessons_of(STREAM_WITH_LABELS, policy_of(lm)) == {at: Spans(tuple(s)) for at, s in inside.items()}
    lm.query_maps.zero_grad()
    total, recall, serving = torch.zeros((), dtype=torch.float64), 0.0, Serving(lm, config, STREAM_WITH_LABELS, 1024)
    for at in sorted(inside):
        scores_N, chosen = literal_scores(lm, serving, at)
        stop = at - at % 16 - 4
        mass_N = scores_N[2:stop].softmax(0)
        total = total - sum(mass_N[a - 2 : b - 2].sum().log() for a, b in inside[at]) / len(inside[at])
        tokens = [t for a, b in inside[at] for t in range(a, b)]
        recall += sum(t in chosen for t in tokens) / len(tokens)
    (0.5 / 7 * total).backward()
    assert loss.selectors.choices == 3
    assert loss.selectors.total == pytest.approx(total.item(), rel=1e-10)
    assert loss.selectors.recall == pytest.approx(recall, rel=1e-12)
    assert recall > 0
    torch.testing.assert_close(ours, lm.query_maps.change_CGDD.grad, rtol=0, atol=1e-12)
    assert ours.abs().max() > 1e-3


@pytest.mark.parametrize("k", [0, 1, "all"])
def test_recorded_passes_teach_them_the_same(lm, monkeypatch, k):
    """Queries of passes between marks, and of whole segments: they carry no gradient there, either."""
    monkeypatch.setattr(passes, "_RECORDED_AT", 1)
    play_recordings(monkeypatch)
    add_lora(lm)
    found = []
    for record in (False, True):
        trainer = SegmentedTrainer(lm, SEGMENT, k=k, selector_weight=0.5, record=record)
        losses = [trainer.loss_and_grad(STREAM_WITH_LABELS, 100) for _ in range(2)]
        found.append((losses, [p.grad.clone() for p in trainer.parameters]))
        for p in trainer.parameters:
            p.grad = None
    (expected_losses, expected), (losses, ours) = found
    for ours_of, expected_of in zip(losses, expected_losses, strict=True):
        assert astuple(ours_of.selectors) == pytest.approx(astuple(expected_of.selectors), rel=1e-12)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_what_chooses_at_no_marks_learns_at_segments_starts(lm):
    deaf = SegmentedTrainer(lm, tiny_segment(turn_marks=False))
    assert list(deaf.lessons(STREAM_WITH_LABELS)) == [64]
    assert deaf.loss_and_grad(STREAM_WITH_LABELS, 100).selectors.choices == 1


def test_no_gradient_of_it_reaches_the_model(lm):
    add_lora(lm)
    found = []
    for weight in (0.0, 5.0):
        SegmentedTrainer(lm, SEGMENT, selector_weight=weight).loss_and_grad(STREAM_WITH_LABELS, 100)
        found.append({n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None})
        lm.model.zero_grad()
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_selectors_alone_can_be_trained(lm):
    trainer = SegmentedTrainer(lm, SEGMENT)
    assert trainer.parameters == [lm.query_maps.change_CGDD]
    trainer.loss_and_grad(STREAM_WITH_LABELS, 100)
    assert lm.query_maps.change_CGDD.grad is not None


def planted(seed: int) -> TrainingStream:
    """Random tokens, and a 7 somewhere, which is what the question, of 9s, needs."""
    generator = torch.Generator().manual_seed(seed)
    tokens, at = torch.randint(10, 40, (40,), generator=generator), 4 + seed % 20
    tokens[at], tokens[32:38] = 7, 9
    labels = torch.where(torch.arange(40) == 39, tokens, IGNORED)
    return TrainingStream(f"planted {seed}", tokens, labels, marks=(38,), needed={38: ((at, at + 1),)})


def test_the_loss_falls_and_recall_rises():
    """On streams that weren't trained on, too; and the model's own cells stay as they are."""
    lm = with_maps(CausalLM(tiny_model()))
    trainer = SegmentedTrainer(lm, tiny_segment(retrieved_tokens=4), k=0, selector_weight=1.0)
    optimizer = MasterOptimizer(trainer.parameters, partial(torch.optim.Adam, lr=0.1), max_norm=None)

    def epoch(seeds: range, learn: bool) -> tuple[float, float]:
        loss = recall = 0.0
        for seed in seeds:
            found = trainer.loss_and_grad(planted(seed), 100, len(seeds)).selectors
            loss, recall = loss + found.total / len(seeds), recall + found.recall / len(seeds)
        if learn:
            optimizer.step()
        optimizer.zero_grad()
        return loss, recall

    held_out = range(100, 110)
    before = epoch(held_out, learn=False)
    for _ in range(20):
        epoch(range(10), learn=True)
    after = epoch(held_out, learn=False)
    assert before[0] > 3.0
    assert before[1] < 0.5
    assert after[0] < 0.5
    assert after[1] == pytest.approx(1.0)


# --- Taught by attention ---


def test_attention_mass_is_that_of_full_attention():
    lm, tokens = CausalLM(tiny_model()), STREAM[:50]
    cells = frozenset({Cell(0, 1), Cell(1, 0)})
    parts = [(16, 20), (32, 50)]
    lm.model.set_attn_implementation("eager")
    own = tiny_model()
    own.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = own(input_ids=tokens[None], output_attentions=True).attentions
    lm.model.set_attn_implementation("segcore")
    for (a, b), mass_T in zip(parts, attention_mass(lm, tokens, parts, cells), strict=True):
        expected = sum(
            attentions[c.layer][0, 2 * c.kv_head : 2 * c.kv_head + 2, a:b, :a].sum(dim=(0, 1)) for c in cells
        )
        torch.testing.assert_close(mass_T[:a], expected, rtol=0, atol=1e-4)  # transformers' angles are in fp32
        assert not mass_T[a:].any()


def test_attention_teaches_each_choice_that_something_is_predicted_after(lm):
    labels = torch.where((torch.arange(90) >= 33) & (torch.arange(90) < 64), STREAM[:90], IGNORED)
    stream = TrainingStream("plain", STREAM[:90], labels, marks=(7, 53, 88))
    assert choice_points(stream, tiny_segment(refresh_tokens=10)) == [16, 26, 32, 42, 48, 53, 58, 64, 74, 80, 88]
    lessons = lessons_by_attention(lm, stream, policy_of(lm))
    assert list(lessons) == [32, 48, 53]
    assert all(
        not lesson.share_T[:2].any() and not lesson.share_T[at - at % 16 - 4 :].any() for at, lesson in lessons.items()
    )
    trainer = SegmentedTrainer(lm, SEGMENT, attention_teaches=True, k=0)
    assert trainer.lessons(stream).keys() == lessons.keys()
    assert trainer.lessons(STREAM_WITH_LABELS).keys() == {20, 53, 64}
    loss = trainer.loss_and_grad(stream, 100).selectors
    assert loss.choices == 3
    assert 0 < loss.recall < 3
    total, serving = 0.0, Serving(lm, SEGMENT, stream, 1024)
    for at in (32, 48, 53):
        with torch.no_grad():
            scores_N, _ = literal_scores(lm, serving, at)
        share_N = lessons[at].share_T[2 : at - at % 16 - 4]
        total -= float((share_N / share_N.sum() * scores_N[2 : at - at % 16 - 4].log_softmax(0)).sum())
    assert loss.total == pytest.approx(total, rel=1e-10)


def test_attention_cannot_teach_a_stream_beyond_its_positions(lm):
    with pytest.raises(InvalidInput, match="full attention can teach 512"):
        SegmentedTrainer(lm, SEGMENT, attention_teaches=True).loss_and_grad(
            TrainingStream("long", STREAM.repeat(5)), 1000
        )


# --- What was trained is what serves ---


def answers(loaded: segcore.LoadedModel, running) -> tuple[list[int], bytes, Engine]:
    engine = running(Engine(loaded.lm, loaded.identified(EngineConfig(segment=SEGMENT, chunk_tokens=16))))
    engine.open("s")
    engine.append("s", STREAM[:80].tolist())
    return engine._sessions["s"].past.journal.tokens.tolist(), engine.snapshot("s"), engine


def test_maps_travel_with_the_adapter_and_choose_in_serving(model_directory, tmp_path, running):
    load = partial(segcore.load_model, str(model_directory), dtype="float64", device="cpu")
    trained = with_maps(load().lm, 3.0)
    saved = save_adapter(trained, tmp_path, base_model=str(model_directory), segment=SEGMENT)
    assert saved.has_selectors
    assert not saved.has_lora
    served = load(adapter=tmp_path)
    assert torch.equal(served.lm.query_maps.change_CGDD, trained.query_maps.change_CGDD)
    assert not served.lm.query_maps.change_CGDD.requires_grad
    further = load().lm
    load_adapter(further, tmp_path)
    assert further.query_maps.change_CGDD.requires_grad
    chosen = []
    for lm in (trained, served.lm, further, load().lm):
        serving = Serving(lm, SEGMENT, STREAM_WITH_LABELS, 16)
        with torch.inference_mode():
            while serving.state.length < 64:
                serving.step()
        chosen.append(serving.state.retrieved_CR.tolist())
    assert chosen[0] == chosen[1] == chosen[2] != chosen[3]
    _, plain, _ = answers(load(), running)
    _, _, engine = answers(served, running)
    with pytest.raises(BlockMismatch, match="adapter, weights"):
        engine.restore("t", plain)


def test_past_kv_depends_on_maps_that_have_no_name_yet(running):
    digests = {
        running(Engine(with_maps(CausalLM(tiny_model()), scale), EngineConfig(segment=SEGMENT))).fingerprint.digest
        for scale in (0.0, 1.0)
    }
    assert len(digests) == 2


def test_maps_of_other_cells_are_refused(lm):
    with pytest.raises(ConfigError, match=r"aren't those that were trained, \[\(0, 1\), \(1, 0\)\]"):
        SegmentedTrainer(lm, tiny_segment(selectors=((0, 0),)))
    for unused in (tiny_segment(retrieved_tokens=0), tiny_segment(selection="cell", selectors=())):
        assert policy_of(lm, unused).query_maps is None


def test_maps_of_another_model_are_refused(lm, tmp_path):
    path = Path(tmp_path / "maps.safetensors")
    lm.query_maps.write(path)
    other = CausalLM(tiny_model(kv_heads=4))
    with pytest.raises(ConfigError, match=r"are \[2, 2, 8, 8\], and LlamaForCausalLM takes \[2, 1, 8, 8\]"):
        QueryMaps.read(path, other.spec)
    path.write_bytes(b"{}")
    with pytest.raises(ConfigError, match="holds no maps"):
        QueryMaps.read(path, lm.spec)
