"""The search for selectors: its scores against the model's own code, a planted cell that it must find, its report."""

import dataclasses
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

from segcore.config import Cell, SegmentedConfig
from segcore.errors import ConfigError
from segcore.heads.detect import (
    FullAttention,
    Sighting,
    choose_selectors,
    find_selectors,
    look,
    recall,
    reciprocal_ranks,
)
from segcore.heads.detect import report as make_report
from segcore.heads.probes import TEMPLATES, ProbeConfig, ProbeMaker, ProbeStream, Question
from segcore.heads.report import HeadsReport
from segcore.model import CausalLM
from segcore.policies import make_policy
from segcore.presets import DEFAULT_MODEL, SHIPPED_HEADS, segment_preset
from segcore.tasks.haystack import Haystack
from segcore.text import ChatFormat, TextTokenizer
from tests.conftest import tiny_model
from tests.tokenizers import CHAT_TEMPLATE, byte_tokenizer

WINDOW = 6


def tiny_stream(tokens: list[int]) -> ProbeStream:
    """A document of 60 tokens with two facts; each question is run by itself."""
    questions = [
        Question(
            turn=tokens[60 + 5 * i : 65 + 5 * i],
            after_mark=[*tokens[70:74], *tokens[start + 4 : start + 7]],
            candidates=range(2, 56),
            needle=range(start, start + 8),
            value=range(start + 4, start + 7),
        )
        for i, start in enumerate((12, 32))
    ]
    return ProbeStream(template="tiny", length=80, document=tokens[:60], questions=questions)


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("chunk_tokens", [7, 100])
def test_scores_are_those_of_the_models_own_queries_and_keys(kv_heads, chunk_tokens):
    """Projections and attention weights are read off transformers' own forward pass, and summed up literally."""
    generator = torch.Generator().manual_seed(3)
    stream = tiny_stream(torch.randint(0, 300, (74,), generator=generator).tolist())
    found = look(CausalLM(tiny_model(kv_heads=kv_heads)), stream, window_tokens=WINDOW, chunk_tokens=chunk_tokens)

    own, eager = tiny_model(kv_heads=kv_heads), tiny_model(kv_heads=kv_heads)
    eager.set_attn_implementation("eager")  # gives weights, but rounds them to fp32
    projected = {}
    for layer, block in enumerate(own.model.layers):
        for name in ("q_proj", "k_proj"):
            module = getattr(block.self_attn, name)
            module.register_forward_hook(lambda _m, _i, out, key=(layer, name): projected.__setitem__(key, out[0]))
    group = 4 // kv_heads
    for question, sighting in zip(stream.questions, found, strict=True):
        before = len(stream.document) + len(question.turn)
        tokens = torch.tensor([[*stream.document, *question.turn, *question.after_mark]])
        own(tokens, use_cache=False)
        weights = eager(tokens, output_attentions=True, use_cache=False).attentions
        for row, (layer, kv_head) in enumerate((lay, h) for lay in range(2) for h in range(kv_heads)):
            keys = projected[layer, "k_proj"].view(-1, kv_heads, 8)[:before, kv_head]
            queries = projected[layer, "q_proj"].view(-1, 4, 8)[before - WINDOW : before]
            heads = range(kv_head * group, (kv_head + 1) * group)
            literal = [sum(max(float(q[h] @ key) for q in queries) for h in heads) / math.sqrt(8) for key in keys]
            torch.testing.assert_close(
                sighting.scores_CN[row], torch.tensor(literal, dtype=torch.float64), rtol=0, atol=1e-10
            )
            for g, h in enumerate(heads):
                # The row that predicts a token is one before it.
                tops = weights[layer][0, h, -len(question.value) - 1 : -1].argmax(dim=-1).tolist()
                share = sum(a == b for a, b in zip(tops, question.value, strict=True)) / len(question.value)
                assert float(sighting.copied_CG[row, g]) == pytest.approx(share)


class PlantedModel:
    """Stands for a CausalLM of 2 layers, 2 KV heads and 3 query heads each, with two cells that do something.

    In SELECTOR, one query head looks for its own token; in COPIER, one looks for what followed its token last time.
    """

    SELECTOR, COPIER = Cell(1, 0), Cell(0, 1)

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.spec = SimpleNamespace(
            layers=2, kv_heads=2, queries_per_kv_head=3, head_dim=vocabulary, dtype=torch.float64, device="cpu"
        )

    def rope(self, q, k, first_position):
        return q, k

    def __call__(self, tokens_T, attend):
        own_TD = torch.nn.functional.one_hot(tokens_T, self.vocabulary).double()
        before_TD = own_TD.roll(1, dims=0)
        for layer in range(2):
            k_HTD = own_TD.new_zeros(2, *own_TD.shape)
            q_HGTD = own_TD.new_zeros(2, 3, *own_TD.shape)
            for cell, head, keys_TD in ((self.SELECTOR, 2, own_TD), (self.COPIER, 1, before_TD)):
                if cell.layer == layer:
                    k_HTD[cell.kv_head], q_HGTD[cell.kv_head, head] = keys_TD, own_TD
            attend(layer, q_HGTD, k_HTD, torch.zeros_like(k_HTD), 1.0)


def planted_stream() -> ProbeStream:
    """Every token is another, but for a question's key, here the needle's last token, and the value that is copied."""
    tokens = list(range(1, 75))
    stream = tiny_stream(tokens)
    for question in stream.questions:
        question.turn[0] = tokens[question.needle.stop - 1]
        # The lead ends with what stands before the value in the needle, as leads do.
        question.after_mark[3] = tokens[question.value.start - 1]
    return stream


def test_a_planted_cell_is_found():
    """One query head of three is enough: cells are whole KV heads."""
    found = look(PlantedModel(80), planted_stream(), window_tokens=WINDOW)  # type: ignore[arg-type]
    chosen, means = choose_selectors(found, 2, 4)
    assert (chosen, means) == ([2], [1.0])  # row 2 is layer 1, KV head 0; no other cell adds to it
    for sighting in found:
        copied = sighting.copied_CG
        assert copied[1].tolist() == [0, 1, 0]  # row 1 is layer 0, KV head 1
        assert copied.sum() == 1


def test_figures_are_means_by_layer_and_kv_head():
    model = PlantedModel(80)
    seen = look(model, planted_stream(), window_tokens=WINDOW)  # type: ignore[arg-type]
    loaded = SimpleNamespace(name="planted", lm=model)
    made = make_report(loaded, "tokens", ProbeConfig(), SegmentedConfig(block_tokens=4), seen, 2)  # type: ignore[arg-type]
    assert made.selectors == (PlantedModel.SELECTOR,)
    assert made.retrieval_head == ((0.0, 1.0), (0.0, 0.0))  # of the copier's three query heads, the best
    assert made.reciprocal_rank[1][0] == made.selectors_reciprocal_rank[0] == 1.0
    blind = [float(reciprocal_ranks(torch.zeros(1, 65), s.question, 4)) for s in seen]
    assert made.reciprocal_rank[1][1] == pytest.approx(sum(blind) / 2, abs=1e-4)
    assert made.recall == (((1.0, 1.0), (1.0, 1.0)),) * 3  # budgets hold every candidate
    assert (made.questions, made.budgets) == (2, (128, 256, 512))


def test_questions_of_a_document_do_not_see_each_other():
    stream = planted_stream()
    for i in (0, 1):
        alone = dataclasses.replace(stream, questions=[stream.questions[i]])
        (want,) = look(CausalLM(tiny_model()), alone, window_tokens=WINDOW)
        got = look(CausalLM(tiny_model()), stream, window_tokens=WINDOW)[i]
        assert torch.equal(got.scores_CN, want.scores_CN)
        assert torch.equal(got.copied_CG, want.copied_CG)


class RisingModel(PlantedModel):
    """Every query likes a token better the larger its number is."""

    def __call__(self, tokens_T, attend):
        k_HTD = tokens_T.double()[None, :, None].expand(2, -1, self.vocabulary)
        for layer in range(2):
            attend(layer, torch.ones(2, 3, len(tokens_T), self.vocabulary).double(), k_HTD, k_HTD, 1.0)


def test_no_head_attends_to_what_comes_later():
    stream = FullAttention(RisingModel(4), 9, WINDOW)  # type: ignore[arg-type]
    stream.run([10, 11, 12, 13])
    tops_CGT = stream.run([14, 15, 3, 16, 17], top_of=4)
    assert tops_CGT.tolist() == [[[5, 5, 7, 8]] * 3] * 4


def question_at(needle: range, candidates: range = range(4, 40)) -> Question:
    return Question(turn=[], after_mark=[], candidates=candidates, needle=needle, value=needle)


@pytest.mark.parametrize(
    ("scores", "rank"),
    [
        ({21: 9.0}, 1),
        ({21: 9.0, 13: 8.0}, 1),
        ({21: 8.0, 13: 9.0, 14: 9.5}, 2),  # both in one block
        ({21: 8.0, 13: 9.0, 30: 9.0}, 3),
        ({21: 8.0, 13: 8.0}, 2),  # a tie counts against the needle
        ({21: 8.0, 3: 9.0, 40: 9.0, 43: 9.0}, 1),  # not candidates
        ({}, 8),  # knows nothing: last of the eight candidate blocks that aren't the needle's, and it
    ],
)
def test_rank_is_among_the_blocks_of_candidates(scores, rank):
    tokens = torch.zeros(1, 44)
    for position, score in scores.items():
        tokens[0, position] = score
    got = reciprocal_ranks(tokens, question_at(range(20, 26)), block=4)
    assert float(got) == pytest.approx(1 / rank)


def test_recall_is_the_share_of_the_needle_that_is_chosen():
    scores = torch.zeros(44)
    scores[21] = 2.0  # its block, 20..23, and with 12 tokens its neighbours too
    assert recall(scores, question_at(range(18, 26)), 4, 4) == 0.5
    assert recall(scores, question_at(range(18, 26)), 12, 4) == 1.0
    assert recall(scores, question_at(range(30, 34)), 4, 4) == 0.0


def test_selectors_are_chosen_for_their_sum():
    """Cells 0 and 1 each know one half of the questions, cell 2 is second best at all of them and adds nothing."""
    seen = []
    for i in range(16):
        scores = torch.zeros(4, 44)
        scores[i % 2, 21] = 9.0
        scores[1 - i % 2, [9, 13]] = 1.0
        scores[2, [21, 30]] = 5.0
        scores[2, 30] = 6.0
        seen.append(Sighting(question_at(range(20, 24)), scores, torch.zeros(4, 1)))
    chosen, means = choose_selectors(seen, 3, 4)
    assert sorted(chosen) == [0, 1]
    assert means[-1] == 1.0


def test_a_cell_that_helps_within_chance_does_not_join():
    """Cell 1 brings the needle of one question of eight from rank 3 to 1, and that of another from 1 to 2."""
    seen = []
    for i in range(8):
        scores = torch.zeros(2, 44)
        scores[0, 21] = 5.0
        if i == 0:
            scores[0, [30, 35]] = 6.0
            scores[1, 21] = 2.0
        if i == 1:
            scores[1, 30] = 6.0
        seen.append(Sighting(question_at(range(20, 24)), scores, torch.zeros(2, 1)))
    assert choose_selectors(seen, 2, 4) == ([0], [pytest.approx(11 / 12)])


@pytest.fixture(scope="module")
def maker() -> ProbeMaker:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    text = TextTokenizer(tokenizer)
    return ProbeMaker(text, ChatFormat.of(text), Haystack.built_in(), sink_tokens=4, tail_tokens=256)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_streams_are_what_they_say(maker, template):
    decode = maker.tokenizer.tokenizer.decode
    depths = (0.1, 0.5, 0.9)
    stream = maker.make(template, 3000, depths, random.Random(1))
    assert len({decode(q.turn) for q in stream.questions}) == 3
    for question, depth in zip(stream.questions, depths, strict=True):
        needle = [stream.document[i] for i in question.needle]
        value = [stream.document[i] for i in question.value]
        assert question.after_mark[-len(value) :] == value
        assert decode(needle).endswith(decode(value) + ".")
        key = decode(needle)[1:].removesuffix(decode(value) + ".").strip()
        assert any(word in decode(question.turn) for word in key.split())
        assert decode(question.turn).endswith("<|end|>\n")
        assert decode(question.after_mark).startswith("<|start|>assistant\n")
        assert 2700 < len(stream.document) + len(question.turn) <= 3000
        assert question.candidates == range(4, len(stream.document) + len(question.turn) - 256)
        assert question.needle.start in question.candidates
        assert question.needle.stop - 1 in question.candidates
        at = (question.needle.start - 4) / (len(stream.document) - 260)
        assert abs(at - depth) < 0.15


def test_streams_follow_from_the_seed(maker):
    def streams(seed=0):
        config = ProbeConfig(templates=TEMPLATES[:2], lengths=(2000,), rounds=2, seed=seed)
        return list(maker.streams(config))

    assert streams() == streams()
    documents = [tuple(stream.document) for stream in (*streams(), *streams(seed=1))]
    assert len(set(documents)) == 8


@pytest.mark.parametrize(
    ("haystack", "length", "message"),
    [
        (Haystack.built_in(), 700, "leaves no room"),
        (Haystack("note.txt", "Nothing much. And that is all."), 3000, "note.txt has 27 tokens, and a stream needs"),
    ],
)
def test_streams_that_cannot_be_made_are_refused(maker, haystack, length, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(maker, haystack=haystack).make(TEMPLATES[0], length, [0.1] * 4, random.Random(0))


def test_a_haystack_gives_each_sentence_once():
    text = Haystack("x", "One fish. Two fish?\nRed fish! Blue\n fish.")
    orders = {tuple(text.sentences(random.Random(seed))) for seed in range(20)}
    assert len(orders) == 4
    assert all(sorted(order) == ["Blue fish.", "One fish.", "Red fish!", "Two fish?"] for order in orders)


@pytest.mark.parametrize(
    "wrong",
    [{"templates": ()}, {"lengths": ()}, {"depths": ()}, {"depths": (0.5, 1.5)}, {"rounds": 0}, {"depths": (-0.1,)}],
    ids=str,
)
def test_wrong_probe_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        ProbeConfig(**wrong)


def report(**changes: object) -> HeadsReport:
    values: dict[str, object] = {
        "model": "tiny",
        "haystack": "prose",
        "templates": ("number",),
        "lengths": (512,),
        "depths": (0.5,),
        "rounds": 1,
        "seed": 0,
        "questions": 1,
        "sink_tokens": 4,
        "tail_tokens": 256,
        "window_tokens": 64,
        "block_tokens": 16,
        "budgets": (128,),
        "selectors": (Cell(1, 0),),
        "selectors_reciprocal_rank": (1.0,),
        "selectors_recall": (0.5,),
        "reciprocal_rank": ((0.0, 0.25), (1.0, 0.1)),
        "recall": (((0.0, 0.0), (0.5, 0.0)),),
        "retrieval_head": ((0.0, 0.0), (0.75, 0.0)),
    }
    return HeadsReport(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("readers", [None, (Cell(0, 0), Cell(1, 1)), ()])
def test_a_report_comes_back_from_its_file(tmp_path, readers):
    written = report(readers=readers)
    written.write(tmp_path / "heads.json")
    read = HeadsReport.read(tmp_path / "heads.json")
    assert read == written
    segment = read.apply(SegmentedConfig(retrieved_tokens=128))
    assert segment == SegmentedConfig(retrieved_tokens=128, selectors=(Cell(1, 0),), readers=readers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "blue"}, "unknown or missing.*colour"),
        ({"seed": None}, "unknown or missing.*seed"),  # None here: the field is left out
        ({"method": 0}, "method 0"),
        ({"selectors": [[2, 0]]}, r"cell \(2, 0\) isn't among"),
        ({"selectors": [[0, -1]]}, r"cell \(0, -1\) isn't among"),
        ({"readers": [[0, 2]]}, r"cell \(0, 2\) isn't among"),
        ({"selectors": [[0.5, 0]]}, "isn't a cell"),
        ({"selectors": [[0]]}, "isn't a readable heads report"),
        ({"selectors": 3}, "isn't a readable heads report"),
        ({"retrieval_head": [[0.0, 0.0]]}, "one shape"),
        ({"recall": []}, "one recall for each budget"),
        ({"reciprocal_rank": 1}, "isn't a readable heads report"),
    ],
)
def test_a_wrong_report_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "heads.json"
    report().write(path)
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in values.items() if (name, value) != ("seed", None)}))
    with pytest.raises(ConfigError, match=f"heads.json.*{message}"):
        HeadsReport.read(path)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\udcff"])
def test_what_is_no_report_is_refused(tmp_path, text):
    path = tmp_path / "heads.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"heads\.json"):
        HeadsReport.read(path)


def test_a_report_of_a_larger_model_is_refused_by_the_engine(tiny_lm):
    large = report(
        selectors=(Cell(2, 0),),
        **dict.fromkeys(("reciprocal_rank", "retrieval_head"), ((0.0, 0.0),) * 3),
        recall=(((0.0, 0.0),) * 3,),
    )
    with pytest.raises(ConfigError, match=r"cell \(2, 0\) isn't in the model"):
        make_policy(large.apply(SegmentedConfig(segment_tokens=64, tail_tokens=0)), tiny_lm.spec, tiny_lm.rope)


def test_the_default_models_report_is_shipped_and_used():
    shipped = HeadsReport.read(SHIPPED_HEADS[DEFAULT_MODEL])
    assert shipped.model == DEFAULT_MODEL
    assert (len(shipped.reciprocal_rank), len(shipped.reciprocal_rank[0])) == (30, 3)
    assert shipped.questions == len(shipped.templates) * len(shipped.lengths) * len(shipped.depths) * shipped.rounds
    assert shipped.readers is None
    assert segment_preset(DEFAULT_MODEL).selectors == shipped.selectors
    assert segment_preset("another").selectors == ()


def test_settings_that_cannot_work_are_refused_before_the_model_runs(maker):
    def run(*_: object, **__: object) -> None:
        raise AssertionError("the model ran")

    lm = SimpleNamespace(spec=SimpleNamespace(max_positions=512), __call__=run)
    model = SimpleNamespace(name="small", lm=lm, tokenizer=maker.tokenizer, chat=maker.chat)
    with pytest.raises(ConfigError, match="small was trained on 512 positions: take shorter lengths than 2000"):
        find_selectors(model, Haystack.built_in(), ProbeConfig(lengths=(2000,), rounds=1))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="take at least 1"):
        find_selectors(model, Haystack.built_in(), ProbeConfig(), count=0)  # type: ignore[arg-type]
