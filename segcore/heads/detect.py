"""Finding the selectors: full attention over probe streams, and how well each cell's score ranks what is needed.

Shapes: C cells (layer by layer, KV heads ascending), H KV heads of a layer, G query heads per KV head, T tokens, N past
tokens, B blocks, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segcore.attention.sdpa import sdpa_attention
from segcore.config import Cell, SegmentedConfig
from segcore.errors import ConfigError
from segcore.heads.probes import ProbeConfig, ProbeMaker, ProbeStream, Question
from segcore.heads.report import HeadsReport, Matrix
from segcore.model import CausalLM
from segcore.retrieval import choose_blocks, score_tokens
from segcore.state import Window
from segcore.tasks.haystack import Haystack
from segcore.weights import LoadedModel

# Tokens chosen, for the recalls: the default R, and less of it, as a longer stream would leave to each token.
BUDGETS = (128, 256, 512)
# Standard errors by which a gain must differ from none. The best of a hundred cells is often two above by chance.
SURE = 3.0
# More than so few questions can tell.
DECIMALS = 4


class FullAttention:
    """One stream under full attention, a chunk at a time; notes what the scores need.

    queries: unrotated queries of the latest tokens of each layer, [H, G, <=window_tokens, D].
    """

    def __init__(self, lm: CausalLM, rows: int, window_tokens: int) -> None:
        self._lm, self._window_tokens = lm, window_tokens
        heads = tuple(range(lm.spec.kv_heads))
        like = torch.empty(0, dtype=lm.spec.dtype, device=lm.spec.device)
        self.layers = [Window.allocate(heads, like, lm.spec.head_dim, segment=rows) for _ in range(lm.spec.layers)]
        self.queries = [like.new_zeros((len(heads), lm.spec.queries_per_kv_head, 0, lm.spec.head_dim))] * lm.spec.layers
        self.length = 0

    def run(self, tokens: Sequence[int], *, top_of: int = 0) -> Tensor:
        """Append tokens; returns what each head attends to most from the last `top_of` of them, [C, G, T] positions."""
        tops = []

        def attend(layer: int, q_HGTD: Tensor, k_HTD: Tensor, v_HTD: Tensor, scale: float) -> Tensor:
            window, stop = self.layers[layer], self.length + len(tokens)
            latest = torch.cat([self.queries[layer], q_HGTD], dim=2)
            self.queries[layer] = latest[:, :, -self._window_tokens :].clone()
            rotated_q, rotated_k = self._lm.rope(q_HGTD.flatten(0, 1), k_HTD, self.length)
            window.write(self.length, k_HTD, rotated_k, v_HTD)
            rotated_q, seen_HND = rotated_q.view_as(q_HGTD), window.rotated_HND[:, :stop]
            if top_of:
                tops.append(_most_attended(rotated_q[:, :, -top_of:], seen_HND))
            return sdpa_attention(rotated_q, seen_HND, window.v_HND[:, :stop], scale)

        self._lm(torch.tensor(tokens, device=self._lm.spec.device), attend)
        self.length += len(tokens)
        return torch.cat(tops) if tops else torch.empty(0, dtype=torch.long)

    def cell_scores(self) -> Tensor:
        """The design's section-6 score of each token so far, by each cell alone: [C, N]."""
        scale = self._lm.spec.head_dim**-0.5
        return torch.stack(
            [
                score_tokens([queries_HGWD[head]], [window.k_HND[head : head + 1, : self.length]], scale)
                for queries_HGWD, window in zip(self.queries, self.layers, strict=True)
                for head in window.heads
            ]
        )


def _most_attended(q_HGTD: Tensor, k_HND: Tensor) -> Tensor:
    """The key that each query attends to most, [H, G, T]; the queries are the last T of the N tokens."""
    wide = torch.promote_types(q_HGTD.dtype, torch.float32)
    scores_HGTN = q_HGTD.to(wide) @ k_HND.to(wide).transpose(-1, -2)[:, None]
    tokens, keys = scores_HGTN.shape[-2:]
    future_TN = torch.ones(tokens, keys, dtype=torch.bool, device=q_HGTD.device).triu(keys - tokens + 1)
    return scores_HGTN.masked_fill(future_TN, -torch.inf).argmax(dim=-1)


@dataclass(frozen=True)
class Sighting:
    """What one question showed.

    scores_CN: the score of every token before the mark, by each cell alone.
    copied_CG: share of the value's tokens at which a query head attended most to the token to be copied.
    """

    question: Question
    scores_CN: Tensor
    copied_CG: Tensor


@torch.inference_mode()
def look(lm: CausalLM, probe: ProbeStream, *, window_tokens: int, chunk_tokens: int = 1024) -> list[Sighting]:
    """Run a document under full attention, then each question by itself, its known answer teacher-forced."""
    stream = FullAttention(lm, probe.rows, window_tokens)
    for start in range(0, len(probe.document), chunk_tokens):
        stream.run(probe.document[start : start + chunk_tokens])
    queries = list(stream.queries)
    sightings = []
    for question in probe.questions:
        stream.length, stream.queries = len(probe.document), list(queries)  # rows beyond are written anew
        stream.run(question.turn)
        scores_CN = stream.cell_scores()
        # The query that predicts a token stands one before it.
        tops_CGT = stream.run(question.after_mark[:-1], top_of=len(question.value))
        copied = tops_CGT == torch.tensor(question.value, device=tops_CGT.device)
        sightings.append(Sighting(question, scores_CN, copied.double().mean(dim=-1)))
    return sightings


def reciprocal_ranks(scores_CN: Tensor, question: Question, block: int) -> Tensor:
    """One over the rank of the needle's best block among the candidates' blocks, [C]; ties count against it."""
    first, stop = question.candidates.start, question.candidates.stop
    padded_CN = scores_CN.new_full((len(scores_CN), -(-stop // block) * block), -torch.inf)
    padded_CN[:, first:stop] = scores_CN[:, first:stop]
    best_CB = padded_CN.unflatten(1, (-1, block)).amax(dim=-1)
    needle_B = torch.zeros(best_CB.shape[1], dtype=torch.bool, device=best_CB.device)
    needle_B[question.needle.start // block : (question.needle.stop - 1) // block + 1] = True
    own_C1 = best_CB[:, needle_B].amax(dim=1, keepdim=True)
    rank_C = 1 + (best_CB[:, ~needle_B] >= own_C1).sum(dim=1)
    return torch.reciprocal(rank_C.double())


def recall(scores_N: Tensor, question: Question, tokens: int, block: int) -> float:
    """The share of the needle's tokens that a selection of `tokens` tokens takes."""
    chosen = choose_blocks(
        scores_N, first=question.candidates.start, stop=question.candidates.stop, tokens=tokens, block=block
    )
    return float(((chosen >= question.needle.start) & (chosen < question.needle.stop)).sum()) / len(question.needle)


def choose_selectors(seen: Sequence[Sighting], count: int, block: int) -> tuple[list[int], list[float]]:
    """Greedy forward selection of at most `count` cells: rows of the scores, and the mean reciprocal rank after each.

    The engine sums the selectors' scores, so a cell is judged by the sum with those already chosen. The first is the
    best alone; a further one joins if it raises the mean by more than SURE of the gain's standard errors over the
    questions, for a cell that helps on these alone costs memory and helps nowhere. Ties go to the earlier cell.
    """
    chosen: list[int] = []
    means: list[float] = []
    now_Q = torch.zeros(len(seen), dtype=torch.float64)
    while len(chosen) < count:
        sums = ((s.scores_CN + s.scores_CN[chosen].sum(dim=0), s.question) for s in seen)
        ranks_QC = torch.stack([reciprocal_ranks(sum_CN, question, block) for sum_CN, question in sums]).cpu()
        ranks_QC[:, chosen] = 0.0
        best = int(ranks_QC.mean(dim=0).argmax())
        gain_Q = ranks_QC[:, best] - now_Q
        if chosen and not float(gain_Q.mean()) > SURE * float(gain_Q.std()) / len(seen) ** 0.5:
            break
        chosen.append(best)
        now_Q = ranks_QC[:, best]
        means.append(float(now_Q.mean()))
    return chosen, means


def find_selectors(
    model: LoadedModel,
    haystack: Haystack,
    config: ProbeConfig,
    *,
    segment: SegmentedConfig | None = None,
    count: int = 2,
    on_stream: Callable[[int, int], None] = lambda done, total: None,
) -> HeadsReport:
    """Run the probes and choose at most `count` selectors.

    segment: whose sinks, reader's tail, query window and blocks the streams are judged by; default: SegmentedConfig().
    on_stream: told how many streams are done, of how many, before each and after the last.
    Holds every question's scores until the end, cells x tokens x 4 bytes. Raises ConfigError before the model runs.
    """
    segment = segment or SegmentedConfig()
    if count < 1:
        raise ConfigError(f"{count} selectors can't choose: take at least 1")
    maker = ProbeMaker(model.tokenizer, model.chat, haystack, segment.sink_tokens, segment.reader_tail_tokens)
    streams = list(maker.streams(config))
    longest, positions = max(stream.rows for stream in streams), model.lm.spec.max_positions
    if longest > positions:
        raise ConfigError(
            f"the longest stream has {longest} tokens with its answer, and {model.name} was trained on {positions}"
            f" positions: take shorter lengths than {max(config.lengths)}"
        )
    seen: list[Sighting] = []
    for done, stream in enumerate(streams):
        on_stream(done, len(streams))
        seen += look(model.lm, stream, window_tokens=segment.query_window_tokens)
    on_stream(len(streams), len(streams))
    return report(model, haystack.name, config, segment, seen, count)


def report(
    model: LoadedModel,
    haystack: str,
    config: ProbeConfig,
    segment: SegmentedConfig,
    seen: Sequence[Sighting],
    count: int,
) -> HeadsReport:
    """What was seen, in figures."""
    block, kv_heads = segment.block_tokens, model.lm.spec.kv_heads
    budgets = tuple(tokens for tokens in BUDGETS if tokens % block == 0)
    chosen, means = choose_selectors(seen, count, block)
    ranks_C = torch.stack([reciprocal_ranks(s.scores_CN, s.question, block) for s in seen]).mean(dim=0)
    recalls = [[_recalls(s.scores_CN, s.question, tokens, block) for s in seen] for tokens in budgets]
    together = [[recall(s.scores_CN[chosen].sum(dim=0), s.question, tokens, block) for s in seen] for tokens in budgets]
    # The mean comes first, so that one lucky question doesn't make a retrieval head.
    copied_C = torch.stack([s.copied_CG for s in seen]).mean(dim=0).amax(dim=-1)
    return HeadsReport(
        model=model.name,
        haystack=haystack,
        templates=tuple(template.name for template in config.templates),
        lengths=config.lengths,
        depths=config.depths,
        rounds=config.rounds,
        seed=config.seed,
        questions=len(seen),
        sink_tokens=segment.sink_tokens,
        tail_tokens=segment.reader_tail_tokens,
        window_tokens=segment.query_window_tokens,
        block_tokens=block,
        budgets=budgets,
        selectors=tuple(Cell(*divmod(row, kv_heads)) for row in chosen),
        selectors_reciprocal_rank=tuple(round(mean, DECIMALS) for mean in means),
        selectors_recall=tuple(round(sum(shares) / len(seen), DECIMALS) for shares in together),
        reciprocal_rank=_matrix(ranks_C, kv_heads),
        recall=tuple(_matrix(torch.stack(shares).mean(dim=0), kv_heads) for shares in recalls),
        retrieval_head=_matrix(copied_C, kv_heads),
    )


def _recalls(scores_CN: Tensor, question: Question, tokens: int, block: int) -> Tensor:
    return torch.tensor([recall(scores_N, question, tokens, block) for scores_N in scores_CN], dtype=torch.float64)


def _matrix(values_C: Tensor, kv_heads: int) -> Matrix:
    """Layers x KV heads."""
    return tuple(tuple(round(value, DECIMALS) for value in row) for row in values_C.view(-1, kv_heads).tolist())
