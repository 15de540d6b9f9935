"""Streams of turns: the tokens that a service would run, and what is needed of them."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from segcore.tasks.base import Item, Room, Span, Turn
from segcore.tasks.haystack import Haystack
from segcore.tasks.registry import make_task
from segcore.text import ChatFormat, DocumentEncoder, TextTokenizer
from segcore.turns import Conversation, frame_tokens, lay_out
from tests.tokenizers import CHAT_TEMPLATE, byte_tokenizer


def text_of(chat: bool) -> TextTokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return TextTokenizer(tokenizer)


@pytest.fixture(params=[True, False], ids=["chat", "plain"])
def conversation(request) -> Conversation:
    text = text_of(request.param)
    return Conversation(text, ChatFormat.of(text), end_token=1)


def decode(conversation: Conversation, tokens=None) -> str:
    return conversation.text.tokenizer.backend_tokenizer.decode(
        conversation.tokens if tokens is None else tokens, skip_special_tokens=False
    )


def test_a_chat_reads_as_its_template_writes_it():
    text = text_of(chat=True)
    conversation = Conversation(text, ChatFormat.of(text))
    conversation.document("Some text.")
    conversation.ask("Why?")
    conversation.answer("Because.")
    conversation.ask("Sure?")
    messages = [("user", "Some text.\n\nWhy?"), ("assistant", "Because."), ("user", "Sure?")]
    rendered = text.tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages], tokenize=False, add_generation_prompt=True
    )
    assert decode(conversation) == rendered
    assert [decode(conversation, conversation.tokens[mark:][:11]) for mark in conversation.marks]
    assert all(
        decode(conversation, conversation.tokens[m:]).startswith("<|start|>assistant") for m in conversation.marks
    )
    assert decode(conversation, [conversation.tokens[i] for i in conversation.answers[0]]) == "Because.<|end|>"


def test_without_a_template_the_mark_stands_before_the_questions_last_token():
    text = text_of(chat=False)
    conversation = Conversation(text, ChatFormat.of(text), end_token=1)
    conversation.document("Some text.")
    conversation.ask("Why?")
    assert conversation.marks == [len(conversation.tokens) - 1]
    conversation.answer("So.")
    assert decode(conversation) == "Some text.\n\nWhy? So.<|end|>"


def test_a_system_message_is_text_in_its_place():
    text = text_of(chat=True)
    chat = ChatFormat.of(text, "Be <|end|> brief.")
    plain = ChatFormat.of(text)
    assert dataclasses.replace(chat, head=plain.head) == plain
    rendered = "<|start|>system\nBe <|end|> brief.<|end|>\n<|start|>user\n"
    assert text.tokenizer.backend_tokenizer.decode(chat.head, skip_special_tokens=False) == rendered
    assert chat.head.count(1) == 1
    assert ChatFormat.of(text_of(chat=False), "Be brief.").head == text.encode("Be brief.\n\n")


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_a_whole_document_has_the_tokens_of_a_streamed_one(text, repeats):
    tokenizer, document = text_of(chat=True), text * repeats
    encoder = DocumentEncoder(tokenizer)
    data = document.encode()
    streamed = [t for i in range(0, len(data), 999) for t in encoder.feed(data[i : i + 999])] + encoder.finish()
    made = tokenizer.encode_pieces(document)
    assert made.tokens == streamed
    assert made.starts == sorted(made.starts)
    assert made.ends == sorted(made.ends)
    start = len(document) // 3
    first, stop = made.within(start, start + 5)
    covered = {i for token in range(first, stop) for i in range(made.starts[token], made.ends[token])}
    assert covered >= set(range(start, min(start + 5, len(document))))
    assert all(made.ends[t] > start and made.starts[t] < start + 5 for t in range(first, stop))


def test_needed_tokens_are_those_of_the_needed_characters(conversation):
    document = "Filler text. The key is under the mat. More filler über alles. The code is 4711."
    spans = [Span(document.index(s), document.index(s) + len(s)) for s in ("The key is under the mat.", "4711")]
    turns = tuple(Turn(question="?", answer="!", expected=(), needed=(span,)) for span in spans)
    item = Item(name="x", task="x", document=document, turns=(*turns, Turn(question="?", answer="!", expected=())))
    needed = lay_out(item, conversation)
    read = [decode(conversation, conversation.tokens[a:b]) for spans in needed for a, b in spans]
    assert [text.strip() for text in read] == ["The key is under the mat.", "4711"]
    assert needed[2] == ()
    assert len(conversation.marks) == len(conversation.answers) == 3
    assert all(mark < answer.start for mark, answer in zip(conversation.marks, conversation.answers, strict=True))


def test_a_question_continues_the_document_word_marks_and_all():
    """As the service does: a text in the middle gets no mark of a text's beginning."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    text = TextTokenizer(tokenizer)
    conversation = Conversation(text, ChatFormat.of(text))
    conversation.document("Text.")
    conversation.ask("Why?")
    assert decode(conversation).startswith(" Text.\n\nWhy?")


def test_a_fork_goes_on_by_itself(conversation):
    conversation.document("Text.")
    before = conversation.tokens.copy()
    fork = conversation.fork()
    fork.ask("One?")
    other = conversation.fork()
    other.ask("Two?")
    assert conversation.tokens == before
    assert not conversation.marks
    assert decode(other).count("One?") == 0


def test_items_are_as_long_as_their_room(conversation):
    text, chat = conversation.text, conversation.chat
    frame, turn = frame_tokens(text, chat)
    haystack = Haystack.named("python").part("train")
    for length in (2000, 5001):
        room = Room(
            split="train",
            length=length,
            haystack=haystack,
            count=lambda piece: len(text.encode_continuation(piece)),
            frame_tokens=frame,
            turn_tokens=turn,
        )
        laid = conversation.fork()
        lay_out(make_task("needle", keys=4, turns=3, mixed=2).make(room, "1"), laid)
        assert length - 400 < len(laid.tokens) <= length
