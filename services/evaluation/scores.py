"""How answers are judged: each metric lies between 0 and 1, higher is better.

ROUGE, edit similarity and Chinese words come from the libraries that the benchmarks use, which are imported when they
are needed: some take seconds.
"""

from __future__ import annotations

import importlib
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from segcore.errors import ConfigError
from segcore.tasks.base import Match

Metric = Callable[[str, Sequence[str], Match], float]
# Of one answer and one expected text.
Pair = Callable[[str, str], float]
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"
    "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def match(answer: str, expected: Sequence[str], mode: Match) -> float:
    """RULER's: the share of the expected texts that occur in the answer, or whether any does; case is ignored."""
    held = [text.lower() in answer.lower() for text in expected]
    return float(any(held)) if mode == "any" else sum(held) / max(1, len(held))


def exact(answer: str, expected: Sequence[str], mode: Match) -> float:
    """SQuAD's: the answer is an expected text, but for case, punctuation, articles and white space; of several that
    are all expected, it has their words and no others, in any order."""
    if mode == "any":
        return best(lambda a, b: float(_words(a) == _words(b)), answer, expected)
    found, wanted = (Counter(_words(text)) for text in (answer, " ".join(expected)))
    found.pop("and", None)
    return float(found == wanted)


def f1(answer: str, expected: Sequence[str], mode: Match) -> float:
    """SQuAD's: overlap of such words, with the best of the expected texts, or with all of them together."""
    return best(word_f1, answer, expected if mode == "any" else [" ".join(expected)])


METRICS: dict[str, Metric] = {"match": match, "exact": exact, "f1": f1}


def best(pair: Pair, answer: str, expected: Sequence[str]) -> float:
    """By the expected text that it is nearest to."""
    return max((pair(answer, text) for text in expected), default=0.0)


def word_f1(answer: str, expected: str) -> float:
    """SQuAD's."""
    return overlap(_words(answer), _words(expected))


def chinese_f1(answer: str, expected: str) -> float:
    """LongBench's: overlap of words as jieba cuts them, but for case, punctuation and white space."""
    found, wanted = ([bare for word in _cut(text) if (bare := chinese_bare(word))] for text in (answer, expected))
    return overlap(found, wanted)


def overlap(found: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of two bags."""
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def rouge_l(answer: str, expected: str) -> float:
    """F of ROUGE-L as package `rouge` has it, which LongBench uses; 0 where it fails, as there."""
    try:
        return float(_library("rouge").Rouge().get_scores(answer, expected)[0]["rouge-l"]["f"])
    except (ValueError, RecursionError):  # an answer without words; one with a line of thousands
        return 0.0


def chinese_rouge_l(answer: str, expected: str) -> float:
    """The same of words as jieba cuts them."""
    return rouge_l(" ".join(_cut(answer)), " ".join(_cut(expected)))


def rouge_l_sum(answer: str, expected: str) -> float:
    """F of ROUGE-Lsum as package `rouge-score` has it, which InfiniteBench uses."""
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(["rougeLsum"])
    return float(scorer.score(expected, answer)["rougeLsum"].fmeasure)


def edit_similarity(answer: str, expected: str) -> float:
    """In whole percents, as LongBench has it."""
    percent: int = round(_library("rapidfuzz.fuzz").ratio(answer, expected))
    return percent / 100


def chinese_bare(text: str) -> str:
    """A text without case, punctuation and white space."""
    return "".join(c for c in "".join(text.lower().split()) if c not in string.punctuation + _CHINESE_PUNCTUATION)


def _words(text: str) -> list[str]:
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _cut(text: str) -> list[str]:
    cut: list[str] = _library("jieba").lcut(text)
    return cut


def _library(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jieba's own, about its regular expressions
            return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"a metric needs {name.partition('.')[0]}: pip install 'segcore[eval]'") from error
