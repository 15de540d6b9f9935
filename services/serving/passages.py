"""Where in its documents a stream's tokens come from."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from segcore.text import TextTokenizer
from services.serving.messages import Passage


class Placed(NamedTuple):
    """A document, and where in the stream its tokens begin."""

    document_id: str
    first_token: int
    text: str


def passages(tokenizer: TextTokenizer, documents: Iterable[Placed], positions: Sequence[int]) -> list[Passage]:
    """The parts of documents that tokens at these ascending positions of the stream were made of.

    Tokens that follow each other are one passage. What wasn't a document's, questions and answers, is left out.
    """
    found = []
    for document_id, first_token, text in documents:
        made = tokenizer.encode_pieces(text)
        begin = bisect_left(positions, first_token)
        end = bisect_left(positions, first_token + len(made.tokens))
        offsets = _byte_offsets(text)
        for first, last in _runs([position - first_token for position in positions[begin:end]]):
            start, stop = offsets[made.starts[first]], offsets[made.ends[last]]
            found.append(Passage(document_id=document_id, start_byte=start, end_byte=stop, tokens=last - first + 1))
    return found


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """The first and the last of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _byte_offsets(text: str) -> Sequence[int]:
    """Of each character, and of the end, where in the text's UTF-8 it begins."""
    if text.isascii():
        return range(len(text) + 1)
    offsets = [0]
    for character in text:
        offsets.append(offsets[-1] + len(character.encode()))
    return offsets
