"""Policy `ltri`: what it retrieves, from what reached attention, against literal readings of its method."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GraniteConfig, GraniteForCausalLM

from segcore.attention.reference import reference_attention
from segcore.config import CacheConfig, Cell, LtriConfig
from segcore.engine.runner import Runner
from segcore.errors import ConfigError
from segcore.model import CausalLM
from segcore.pastkv.manager import PastKVManager
from segcore.policies.ltri import LtriPolicy
from segcore.segments import tokens_to_next_cut
from tests.conftest import FAMILIES, VOCABULARY, tiny_model, tiny_spans
from tests.segcore import literal
from tests.segcore.test_invariants import EXACT, MARKS

STREAM = torch.randint(0, VOCABULARY, (133,), generator=torch.Generator().manual_seed(5))

pytestmark = pytest.mark.usefixtures("no_gradients")


class Witness:
    """Runs a stream under a policy and writes down what reached attention, to say what should have been chosen."""

    def __init__(self, lm: CausalLM, config: LtriConfig) -> None:
        self.lm, self.config, self.runner = lm, config, Runner(lm, config)
        self.state = self.runner.begin()
        self.past = PastKVManager(CacheConfig()).open_stream(self.runner.policy.layout)
        self.layer, self.calls = config.selectors[0].layer, 0
        self.rotated_q, self.rotated_k, self.queries = [], None, []
        self.attention, self.true_attention, self.spans, self.vectors = [], [], [], []
        self._spy()

    def _spy(self) -> None:
        runner, policy = self.runner, self.runner.policy
        attend, watch, searched = runner.attention, runner._watch, policy.searched

        def attending(q_HGTD, k_HND, v_HND, scale):
            if self.calls % self.lm.spec.layers == self.layer:  # layers attend in order, each with one window
                self.rotated_q.append(q_HGTD.clone())
                self.rotated_k, self.scale = k_HND.clone(), scale
            self.calls += 1
            return attend(q_HGTD, k_HND, v_HND, scale)

        def watching(state, layer, q_HGTD):
            if layer == self.layer:
                self.queries.append(q_HGTD.clone())
            watch(state, layer, q_HGTD)

        def searching(state):
            self.attention.append(policy.attention(state))
            index = searched(state)
            self.spans += index["spans"].tolist()
            return index

        runner.attention, runner._watch, policy.searched = attending, watching, searching

    def run(self, stream_T, marks=(), step=10**9):
        """Yields after every pass and every mark: does a new choice stand now?"""
        while self.state.length < len(stream_T):
            at = self.state.length
            if at in marks and at:
                self.runner.mark(self.state, self.past)
                yield True
            cut = min((m for m in marks if m > at), default=len(stream_T))
            count = min(tokens_to_next_cut(self.state.filled, self.config, step), cut - at, len(stream_T) - at)
            self.runner.advance(stream_T[at : at + count], self.state, self.past)
            if self.state.filled == 0:
                self._closed()
            yield self.state.filled % (self.config.refresh_tokens or self.config.segment_tokens) == 0

    def _closed(self) -> None:
        """Attention of the segment that closed, from what reached attention in its passes, and its literal spans."""
        q_HGSD, k_HND = torch.cat(self.rotated_q, dim=2), self.rotated_k
        self.rotated_q.clear()
        eye = torch.eye(k_HND.shape[1], dtype=torch.float64).expand(k_HND.shape[0], -1, -1)
        weights_HGSN = reference_attention(q_HGSD, k_HND, eye, self.scale)
        heads = [cell.kv_head for cell in self.config.selectors]
        self.true_attention.append(weights_HGSN[heads].sum(dim=(0, 1))[:, -self.config.segment_tokens :])

    def literal_spans(self, segment):
        """Spans of a closed segment, [start, length] each, and their index vectors by selector."""
        c, size = self.config, self.config.segment_tokens
        attention, lengths = self.true_attention[segment].tolist(), []
        for a in range(0, size, c.local_tokens):
            window = [row[a:] for row in attention[a : a + c.local_tokens]]
            pairs = [window[i][j] for i in range(len(window)) for j in range(i + 1)]
            scores = literal.span_scores(window, sum(pairs) / len(pairs), c.span_min_tokens, c.span_max_tokens)
            spans = literal.best_spans(scores, c.overlap)
            lengths += literal.tiles(spans, len(window), c.span_min_tokens, c.span_max_tokens)
        kv_SC2D = self.past.gather(torch.arange(segment * size, (segment + 1) * size))
        received = literal.votes(attention, lengths)
        columns = [self.runner.policy.readers.index(cell) for cell in c.selectors]
        vectors = [literal.index_vectors(kv_SC2D[:, i, 0].tolist(), received, lengths, c.vote_tokens) for i in columns]
        starts = itertools.accumulate(lengths, initial=segment * size)
        return [list(span) for span in zip(starts, lengths, strict=False)], vectors

    def literal_choice(self):
        """What the readers should see now."""
        c, size = self.config, self.config.segment_tokens
        segments = [self.literal_spans(s) for s in range(self.past.segments)]
        closed = len(segments) * size
        sinks = min(c.sink_tokens, closed)
        window = torch.cat(self.queries, dim=2)[:, :, -c.query_window_tokens :]
        spans, scores = [], []
        for found, vectors in segments:
            spans += found
            for k in range(len(found)):
                total = 0.0
                for i, cell in enumerate(c.selectors):
                    for q_WD in window[cell.kv_head].tolist():
                        total += max(sum(a * b for a, b in zip(q, vectors[i][k], strict=True)) for q in q_WD)
                scores.append(total)
        return literal.choice_of_spans(
            spans, scores, sinks, closed - min(c.reader_tail_tokens, closed - sinks), c.retrieved_tokens
        )


@pytest.mark.parametrize("family", [*FAMILIES, "granite"])
def test_attention_is_the_models_own_in_the_first_segment(family):
    """transformers' eager attention gives its probabilities; Granite has a scale of its own."""
    lm, own = (
        (CausalLM(granite()), granite()) if family == "granite" else (CausalLM(tiny_model(family)), tiny_model(family))
    )
    own.set_attn_implementation("eager")
    config = tiny_spans(segment_tokens=24, local_tokens=9, selectors=(Cell(1, 1),))
    witness = Witness(lm, config)
    list(witness.run(STREAM[:24], step=7))
    positions = torch.arange(config.prefix_tokens, config.prefix_tokens + 24)[None]
    weights = own(STREAM[None, :24], position_ids=positions, output_attentions=True).attentions[1][0]
    ((attention_SL, _),) = witness.attention
    # transformers' eager softmax is in fp32.
    torch.testing.assert_close(attention_SL, literal.band(weights[2:].sum(dim=0).tolist(), 8), rtol=0, atol=1e-5)


def granite() -> GraniteForCausalLM:
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_multiplier": 1.5}
    config = GraniteConfig(vocab_size=VOCABULARY, **sizes, **heads, initializer_range=0.3, pad_token_id=None)
    return GraniteForCausalLM(config).double().eval()


CONFIGS = {
    "one-window": tiny_spans(),
    # Windows of 7 leave one of 2, shorter than a span; with spans of 3 or 4 tokens, 5 can't be cut within the lengths.
    "leftovers": tiny_spans(local_tokens=7, span_min_tokens=3, vote_tokens=3),
    "one-selector": tiny_spans(local_tokens=8, selectors=(Cell(0, 1),), refresh_tokens=5, vote_tokens=1, overlap=0.0),
    "long-window": tiny_spans(segment_tokens=12, local_tokens=12, query_window_tokens=20, sink_tokens=0),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("step", [1, 7, 100])
def test_attention_is_true_over_the_prefix_too(tiny_lm, config, step):
    """Whatever the passes and marks: probabilities over everything seen, normalised over the prefix at the close."""
    witness = Witness(tiny_lm, config)
    list(witness.run(STREAM, MARKS, step))
    assert len(witness.attention) == len(STREAM) // config.segment_tokens > 7
    for (attention_SL, means), true_SS in zip(witness.attention, witness.true_attention, strict=True):
        torch.testing.assert_close(attention_SL, literal.band(true_SS.tolist(), 2 * config.span_max_tokens), **EXACT)
        windows = range(0, len(true_SS), config.local_tokens)
        for mean, a in zip(means, windows, strict=True):
            window = true_SS[a : a + config.local_tokens, a : a + config.local_tokens]
            assert mean == pytest.approx(window.sum().item() / (len(window) * (len(window) + 1) / 2), abs=1e-12)
    # Later segments look back beyond themselves.
    assert witness.true_attention[-1].sum() < 0.95 * witness.true_attention[0].sum()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_spans_and_index_equal_the_literal_reading(tiny_lm, config):
    witness = Witness(tiny_lm, config)
    list(witness.run(STREAM, MARKS))
    expected = []
    for segment, piece in enumerate(witness.past.index):
        spans, vectors = witness.literal_spans(segment)
        assert piece["spans"].tolist() == spans
        torch.testing.assert_close(piece["keys"], torch.tensor(vectors, dtype=torch.float64), **EXACT)
        expected += [t for start, length in spans for t in range(start, start + length)]
    # Spans tile what is closed, and none crosses the edge of a window.
    assert expected == list(range(len(STREAM) - len(STREAM) % config.segment_tokens))
    for start, length in witness.spans:
        in_segment = start % config.segment_tokens
        assert in_segment // config.local_tokens == (in_segment + length - 1) // config.local_tokens


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_stream_retrieves_what_the_literal_reading_retrieves(tiny_lm, config):
    """End to end, at every refresh point: segment starts, marks, and refreshes inside a segment."""
    witness, checked = Witness(tiny_lm, config), set()
    for chosen in witness.run(STREAM, MARKS):
        if chosen:
            assert witness.state.retrieved_CR.tolist() == [witness.literal_choice()]
            checked.add(tuple(witness.state.retrieved_CR[0].tolist()))
    assert len(checked) > 7  # choices differ
    assert max(map(len, checked)) > config.retrieved_tokens - config.span_max_tokens


@st.composite
def pasts(draw):
    """Spans of some segments, scored from few values so that ties abound, and the limits of a choice."""
    lengths = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=8), min_size=1, max_size=4))
    scores = [[draw(st.sampled_from([-1.0, 0.0, 2.0, 2.5])) for _ in part] for part in lengths]
    total = sum(map(sum, lengths))
    return lengths, scores, draw(st.integers(0, total)), draw(st.integers(0, total)), draw(st.integers(4, 30))


@settings(deadline=None)
@given(pasts())
def test_a_choice_keeps_its_promises(tiny_lm, case):
    """At most R, ascending, within the limits, whole spans but at the limits, best first and ties to the earlier."""
    lengths, scores, first, stop, tokens = case
    policy = LtriPolicy(tiny_spans(retrieved_tokens=tokens, selectors=(Cell(0, 0),)), tiny_lm.spec, tiny_lm.rope)
    unit = torch.zeros(8, dtype=torch.float64)
    unit[0] = 1.0
    index, spans = [], []
    for part, marks in zip(lengths, scores, strict=True):
        piece = []
        for length in part:
            piece.append([sum(n for _, n in spans), length])
            spans.append(piece[-1])
        index.append({"keys": (unit * torch.tensor(marks)[:, None].double())[None], "spans": torch.tensor(piece)})
    state = SimpleNamespace(queries=[unit.expand(2, 3, 8)])
    chosen = policy.choose(state, SimpleNamespace(index=index), first, stop)
    assert chosen.shape[0] == 1
    assert chosen.dtype == torch.long
    flat = [score for part in scores for score in part]
    assert chosen[0].tolist() == literal.choice_of_spans(spans, flat, first, stop, tokens)
    assert len(chosen[0]) <= tokens


def test_only_the_query_window_chooses(tiny_lm):
    """The state holds a whole segment's queries; those before the query window have no say."""
    policy = LtriPolicy(tiny_spans(selectors=(Cell(0, 0),)), tiny_lm.spec, tiny_lm.rope)
    keys = torch.eye(8, dtype=torch.float64)[None]
    past = SimpleNamespace(index=[{"keys": keys, "spans": torch.tensor([[4 * k, 4] for k in range(8)])}])
    queries = torch.zeros((2, 16, 8), dtype=torch.float64)
    queries[:, :10, 3] = 100.0  # before the window of 6
    queries[:, 10:, 5] = 1.0
    chosen = policy.choose(SimpleNamespace(queries=[queries]), past, 0, 32)
    assert chosen.tolist() == [[0, 1, 2, 3, 20, 21, 22, 23]]


def test_a_resumed_stream_goes_on_as_if_never_interrupted(tiny_lm):
    """Only the query window travels, and that is enough: at once, at a mark inside the segment, and at its close."""
    config = tiny_spans()
    whole, resumed = Witness(tiny_lm, config), Witness(tiny_lm, config)
    list(whole.run(STREAM[:48]))
    list(resumed.run(STREAM[:48]))
    boundary = resumed.past.boundary()
    assert boundary["queries.0"].shape[1] == config.query_window_tokens
    resumed.state, _ = resumed.runner.resume(boundary, resumed.past)
    for _ in zip(whole.run(STREAM, MARKS), resumed.run(STREAM, MARKS), strict=True):
        assert torch.equal(whole.state.retrieved_CR, resumed.state.retrieved_CR)
        for a, b in zip(whole.state.queries, resumed.state.queries, strict=True):
            assert torch.equal(a, b)
        for (a,), (b,) in zip(whole.state.layers, resumed.state.layers, strict=True):
            live = slice(a.start, a.base + whole.state.filled)
            assert torch.equal(a.rotated_HND[:, live], b.rotated_HND[:, live])
            assert torch.equal(a.v_HND[:, live], b.v_HND[:, live])


def test_spans_are_searched_without_a_graph(tiny_lm):
    """Selection carries no gradient (design, section 8)."""
    witness = Witness(tiny_lm, tiny_spans())
    list(witness.run(STREAM[:15]))
    with torch.inference_mode(False):
        state = witness.state
        state.filled, state.length = 16, 16
        state.queries = [torch.randn(2, 16, 8, dtype=torch.float64, requires_grad=True) for _ in state.queries]
        (window,) = state.layers[1]
        window.rotated_HND = window.rotated_HND.clone().requires_grad_()
        window.k_HND = window.k_HND.clone().requires_grad_()
        assert not any(t.requires_grad for t in LtriPolicy.searched(witness.runner.policy, state).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_runs(dtype):
    """Attention in fp32 at least; the index in the model's precision, as past KV promises its size."""
    witness = Witness(CausalLM(tiny_model(dtype=dtype)), tiny_spans())
    list(witness.run(STREAM[:50], MARKS))
    assert {a.dtype for a, _ in witness.attention} == {torch.float32}
    assert {piece["keys"].dtype for piece in witness.past.index} == {dtype}
    assert witness.state.retrieved_CR.shape[1] > 0


def test_the_past_matters(tiny_lm):
    without = Witness(tiny_lm, tiny_spans(retrieved_tokens=0))
    with_past = Witness(tiny_lm, tiny_spans())
    for witness in (without, with_past):
        list(witness.run(STREAM[:64]))
    logits = [w.runner.advance(STREAM[64:65], w.state, w.past) for w in (without, with_past)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert without.runner.policy.watched == ()


def test_config_errors(tiny_lm):
    with pytest.raises(ConfigError, match="set selectors"):
        Runner(tiny_lm, tiny_spans(selectors=()))
    with pytest.raises(ConfigError, match="one probe layer"):
        tiny_spans(selectors=(Cell(0, 0), Cell(1, 0)))
    with pytest.raises(ConfigError, match="room for a span"):
        tiny_spans(retrieved_tokens=3)
    with pytest.raises(ConfigError, match="span_min_tokens"):
        tiny_spans(span_min_tokens=5)
    with pytest.raises(ConfigError, match="isn't in the model"):
        Runner(tiny_lm, tiny_spans(selectors=(Cell(1, 2),)))
    assert Runner(tiny_lm, tiny_spans(selectors=(), retrieved_tokens=0)).policy.layout is None
