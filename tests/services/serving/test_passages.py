"""Which parts of documents tokens stand for."""

from __future__ import annotations

import pytest

from segcore.text import PIECE_CHARS, DocumentEncoder
from services.serving.passages import Placed, passages

TEXT = "The other thing – naïve as it is – was in there. " * 200


@pytest.fixture(scope="module")
def tokenizer(served_model):
    return served_model.tokenizer


def test_a_token_is_found_in_its_document(tokenizer):
    assert len(TEXT) > 2 * PIECE_CHARS
    encoder = DocumentEncoder(tokenizer)
    tokens = [*encoder.feed(TEXT.encode()), *encoder.finish()]
    for index in (0, 1, len(tokens) // 2, len(tokens) - 1):
        (found,) = passages(tokenizer, [Placed("d", 7, TEXT)], [7 + index])
        said = TEXT.encode()[found.start_byte : found.end_byte]
        assert tokenizer.decode_token(tokens[index]).encode() in (said, "\ufffd".encode())


def test_runs_are_passages_and_what_is_no_documents_is_left_out(tokenizer):
    documents = [Placed("a", 3, "abcdef"), Placed("b", 20, "xyz")]
    found = passages(tokenizer, documents, [0, 1, 2, 4, 5, 7, 8, 9, 12, 20, 22, 23])
    assert [(p.document_id, p.start_byte, p.end_byte, p.tokens) for p in found] == [
        ("a", 1, 3, 2),
        ("a", 4, 6, 2),
        ("b", 0, 1, 1),
        ("b", 2, 3, 1),
    ]
    assert passages(tokenizer, documents, []) == []
