"""Text to tokens and back: in pieces, through chat templates, and as an answer that grows."""

import functools
import json
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from segcore.errors import InvalidDocument, InvalidRequest, UnsupportedModel
from segcore.text import PIECE_CHARS, AnswerText, ChatFormat, DocumentEncoder, TextTokenizer, check_question

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't care at all.",
    "A café au lait, naïve façades, 日本語のテキスト and some smiles 🙂🙂.",
    "In 1984 there were 12 or 13 hundred letters; the 14th was lost.\n\nNobody found it.",
] * 5
SPECIAL = ["<|start|>", "<|end|>", "<|pad|>"]
# The splitting rules of GPT-2 and of Qwen, the latter of which keeps digits apart.
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
QWEN = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


def byte_level(rule: pre_tokenizers.PreTokenizer = GPT2, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = rule, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": SPECIAL[1], **special})


def sentencepiece(style: str) -> PreTrainedTokenizerFast:
    """A word mark before every text: by a pre-tokenizer (`metaspace`), or by a normaliser as in Llama 2 (`prepend`)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if style == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for the training only
    trainer = trainers.BpeTrainer(
        vocab_size=320, limit_alphabet=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    made = json.loads(tokenizer.to_str())
    vocabulary = made["model"]["vocab"]
    vocabulary.update({f"<0x{i:02X}>": len(vocabulary) + i for i in range(256)})
    made["model"]["byte_fallback"] = True
    if style == "prepend":
        made["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(made))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "gpt2": TextTokenizer(byte_level()),
    "qwen": TextTokenizer(byte_level(QWEN)),
    "metaspace": TextTokenizer(sentencepiece("metaspace")),
    "prepend": TextTokenizer(sentencepiece("prepend")),
}
BYTES = TOKENIZERS["gpt2"]


def encode_in(tokenizer: TextTokenizer, pieces: list[bytes]) -> list[int]:
    encoder = DocumentEncoder(tokenizer)
    tokens = [token for piece in pieces for token in encoder.feed(piece)]
    return tokens + encoder.finish()


def chop(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` in pieces, some of them perhaps empty; the cuts may fall inside characters."""
    ends = [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


WORDS = [
    "a",
    "the",
    "fox",
    "naïve",
    "日本語",
    "🙂",
    "🙂x",
    "1984",
    "12",
    "don't",
    "(so)",
    "end.",
    "\n",
    "\t",
    "",
    "e\u0301",
]
# A few thousand words, so that a document has more than one piece: repeatable from one number.
documents = st.integers(0, 2**20).map(lambda seed: " ".join(["The", *random.Random(seed).choices(WORDS, k=3000)]))
cuts = st.lists(st.integers(0, 2**20), max_size=12)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=12, deadline=None)
@given(text=documents, cuts=cuts)
def test_tokens_depend_on_the_bytes_alone_and_equal_those_of_the_whole_text(name, text, cuts):
    tokenizer, data = TOKENIZERS[name], text.encode()
    assert len(text) > 2 * PIECE_CHARS
    tokens = encode_in(tokenizer, chop(data, cuts))
    assert tokens == tokenizer.encode(text)
    assert tokenizer.tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text


def test_one_byte_at_a_time():
    text = "naïve 日本語 🙂 " * 600
    data = text.encode()
    assert encode_in(BYTES, [data[i : i + 1] for i in range(len(data))]) == BYTES.encode(text)


@pytest.mark.parametrize("name", ["gpt2", "qwen"])
@pytest.mark.parametrize("unit", ["x", "日本語", "-", " ", "\n", "a_", "🙂"])
@settings(max_examples=5, deadline=None)
@given(cuts=cuts)
def test_text_without_word_gaps_is_complete_and_independent_of_the_cuts(name, unit, cuts):
    text, tokens = without_word_gaps(name, unit)
    assert TOKENIZERS[name].tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text
    assert encode_in(TOKENIZERS[name], chop(text.encode(), cuts)) == tokens


@functools.cache
def without_word_gaps(name: str, unit: str) -> tuple[str, list[int]]:
    """A text of more than two pieces, and its tokens when it comes at once."""
    text = (unit * 10_000)[:10_000]
    return text, encode_in(TOKENIZERS[name], [text.encode()])


@pytest.mark.parametrize("length", range(PIECE_CHARS - 2, PIECE_CHARS + 4))
def test_a_word_gap_about_the_longest_piece(length):
    text = "x" * length + " the fox"
    tokens = encode_in(BYTES, [text.encode()])
    assert tokens == encode_in(BYTES, [bytes([b]) for b in text.encode()])
    assert BYTES.tokenizer.decode(tokens) == text
    if length <= PIECE_CHARS:
        assert tokens == BYTES.encode(text)


def test_tokens_come_as_soon_as_a_piece_is_certain():
    encoder = DocumentEncoder(BYTES)
    assert encoder.feed(b"the fox " * 600) != []
    assert len(BYTES.tokenizer.decode(encoder.finish())) <= PIECE_CHARS + 2


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"text\xff", 4),
        (b"\x80text", 0),
        ("日本".encode() + b"\xe6\x41", 6),
        (b"ab\xed\xa0\x80", 2),  # half of a surrogate pair
        (b"ab\xc0\x80", 2),  # overlong
        (b"abc\0", 3),
        ("日".encode() + b"\0", 3),
        ("日本".encode()[:-1], 3),
        ("x🙂".encode()[:-2], 1),
        (b"x" * 9000 + b"\xff", 9000),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(data, offset):
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))], chop(data, [offset + 1, offset])):
        with pytest.raises(InvalidDocument) as caught:
            encode_in(BYTES, pieces)
        assert caught.value.details["byte_offset"] == str(offset)
        assert str(offset) in caught.value.message or "before its end" in caught.value.message


def first_fault(data: bytes) -> int | None:
    """Where UTF-8 ends, as Python sees it in the whole."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


parts = [b"a", b" ", *(c.encode() for c in "é日🙂"), b"\xe6\x97", b"\xf0\x9f", b"\xff", b"\x80", b"\xed"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(parts), min_size=1, max_size=8).map(b"".join), cuts)
def test_refusal_and_place_are_those_of_the_whole_however_chopped(data, cuts):
    fault = first_fault(data)
    if fault is None:
        assert encode_in(BYTES, chop(data, cuts)) == BYTES.encode(data.decode())
    else:
        with pytest.raises(InvalidDocument) as caught:
            encode_in(BYTES, chop(data, cuts))
        assert caught.value.details["byte_offset"] == str(fault)


@pytest.mark.parametrize("pieces", [[], [b""], [b"", b""]])
def test_an_empty_document_is_refused(pieces):
    with pytest.raises(InvalidDocument, match="empty"):
        encode_in(BYTES, pieces)


@settings(max_examples=15, deadline=None)
@given(documents, cuts)
def test_an_encoder_goes_on_from_the_bytes_that_it_held(text, cuts):
    pieces, encoder, taken, tokens = chop(text.encode(), cuts), DocumentEncoder(BYTES), b"", list[int]()
    for piece in pieces:
        tokens += encoder.feed(piece)
        taken += piece
        held = taken[len(taken) - encoder.bytes_held :]
        encoder = DocumentEncoder.continued(BYTES, len(taken), held)
    if taken:
        assert tokens + encoder.finish() == encode_in(BYTES, pieces)


@settings(max_examples=15, deadline=None)
@given(documents, documents, st.integers(0, 2**20))
def test_forks_go_on_alone(text, other, cut):
    """Also from the middle of a character."""
    data = text.encode()
    cut = 1 + cut % (len(data) - 1)
    encoder = DocumentEncoder(BYTES)
    before = encoder.feed(data[:cut])
    twin, spoilt, ended = encoder.fork(), encoder.fork(), encoder.fork()
    with pytest.raises(InvalidDocument):
        spoilt.feed(other.encode() + b"\xff")
    if first_fault(data[:cut]) is None:
        ended.finish()
    else:
        with pytest.raises(InvalidDocument):
            ended.finish()
    for one in (twin, encoder):
        assert one.bytes_taken == cut
        assert before + one.feed(data[cut:]) + one.finish() == BYTES.encode(text)
        assert one.bytes_taken == len(data)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_names_of_special_tokens_are_ordinary_text(name):
    tokenizer = TOKENIZERS[name]
    names = tokenizer.tokenizer.all_special_tokens if name in ("metaspace", "prepend") else SPECIAL
    special = set(tokenizer.tokenizer.convert_tokens_to_ids(names))
    text = "say " + " or ".join(names) + "".join(names)
    for tokens in (encode_in(tokenizer, [text.encode()]), tokenizer.encode(text), tokenizer.encode_continuation(text)):
        assert not special & set(tokens)
    assert special <= set(tokenizer.encode_template(text))
    assert not special & set(tokenizer.encode(text)), "also after a template"
    assert tokenizer.tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("name", ["metaspace", "prepend"])
def test_a_continuation_gets_no_word_mark_of_its_own(name):
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode("the fox") + tokenizer.encode_continuation(" jumps over")
    assert tokens == tokenizer.encode("the fox jumps over")


def test_tokenizers_that_cannot_stream_are_refused():
    with pytest.raises(UnsupportedModel, match="ByT5Tokenizer"):
        TextTokenizer(ByT5Tokenizer())


CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SYSTEM = "<|start|>system\nBe brief.<|end|>\n" + CHATML
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}### Ask:\n{{ m['content'] | trim }}\n\n"
    "{% else %}### Say:\n{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Say:\n{% endif %}"
)


def chat(template: str | None, **special: str) -> tuple[TextTokenizer, ChatFormat]:
    tokenizer = byte_level(**special)
    tokenizer.chat_template = template
    text = TextTokenizer(tokenizer)
    return text, ChatFormat.of(text)


@pytest.mark.parametrize("template", [CHATML, SYSTEM, ALPACA])
def test_a_chat_fed_as_a_stream_reads_as_the_template_renders_it(template):
    text, form = chat(template)
    first, answer, second = map(text.encode, ("Who found it?", "Nobody.", "Not <|end|> the fox?"))
    end = text.tokenizer.convert_tokens_to_ids("<|end|>")
    before, after = form.prompt_tail(form.head + first)
    stream = before + after + answer
    assert text.tokenizer.decode(before + after) == text.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who found it?"}], tokenize=False, add_generation_prompt=True
    )
    for closed in (stream + form.reopen(None), [*stream, end, *form.reopen(end)]):
        again = closed + [token for part in form.prompt_tail(second) for token in part]
        messages = [("user", "Who found it?"), ("assistant", "Nobody."), ("user", "Not <|end|> the fox?")]
        assert text.tokenizer.decode(again) == text.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=True,
        )


def test_the_mark_stands_before_the_header():
    text, form = chat(CHATML)
    question = text.encode("Who?")
    before, after = form.prompt_tail(question)
    assert before == question + text.encode_template("<|end|>\n")
    assert after == text.encode_template("<|start|>assistant\n")
    assert form.head == text.encode_template("<|start|>user\n")


def test_special_tokens_of_a_template_count_as_such():
    text, form = chat(CHATML)
    start, end = text.tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>"])
    assert (form.head[0], form.end_of_user[0], form.header[0], form.end_of_answer[0]) == (start, end, start, end)


def test_without_a_template_the_mark_stands_before_the_last_token():
    text, form = chat(None)
    assert form == ChatFormat([], [], [], [], text.encode("\n\n"))
    assert form.prompt_tail([5, 6, 7]) == ([5, 6], [7])
    assert form.prompt_tail([5]) == ([], [5])
    assert form.reopen(None) == form.reopen(3) == []


def test_without_a_template_the_head_is_what_the_tokenizer_puts_first():
    tokenizer = byte_level(bos_token="<|start|>")
    start, end = tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", start), ("<|end|>", end)]
    )
    text = TextTokenizer(tokenizer)
    assert ChatFormat.of(text).head == [start]
    assert not {start, end} & set(text.encode("the fox"))


@pytest.mark.parametrize("last", [None, 0, 77])
def test_reopen_completes_the_end_of_an_answer(last):
    form = ChatFormat([], [], [9], [4, 5, 6], [])
    assert form.reopen(last) == [4, 5, 6]
    assert form.reopen(4) == [5, 6]


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("m['content']", "m['content'] | upper"),
        CHATML.replace("m['content']", "m['content'] + m['content']"),
        CHATML.replace("for m in messages", "for m in messages if m['role'] == 'user'"),
        CHATML.replace("for m in messages", "for m in messages[-1:]"),
        CHATML.replace("m['content']", "m['content'] | urlencode"),
        "{% if add_generation_prompt %}Answer this!{% endif %}" + CHATML,
    ],
)
def test_a_template_that_rewrites_messages_is_refused(template):
    with pytest.raises(UnsupportedModel, match="rewrites"):
        chat(template)


@pytest.mark.parametrize("question", ["", " ", "\n\t", "a\0b", "\0"])
def test_questions_that_ask_nothing_are_refused(question):
    with pytest.raises(InvalidRequest) as caught:
        check_question(question)
    assert caught.value.details == {"field": "question"}


def test_questions_may_hold_anything_else():
    check_question("  日本?\n<|end|> ")


def vocabulary_bytes(tokenizer: TextTokenizer) -> dict[bytes, int]:
    """Every token but the special ones, by the bytes it stands for."""
    special = set(tokenizer.tokenizer.all_special_tokens) | set(SPECIAL)
    printable = {chr(b): b for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    others = [b for b in range(256) if b not in printable.values()]
    byte_of = printable | {chr(256 + i): b for i, b in enumerate(others)}
    vocabulary = tokenizer.tokenizer.get_vocab()
    return {bytes(byte_of[c] for c in token): i for token, i in vocabulary.items() if token not in special}


TOKEN_OF = vocabulary_bytes(BYTES)


def some_split(text: str, seed: int) -> list[bytes]:
    """One of the many ways to write a text as tokens; often in the middle of characters and stop strings."""
    data, pieces, chance = text.encode(), [], random.Random(seed)
    while data:
        fitting = [n for n in range(1, 12) if data[:n] in TOKEN_OF and n <= len(data)]
        n = chance.choice(fitting)
        pieces.append(data[:n])
        data = data[n:]
    return pieces


def longest_overlap(text: str, stops: list[str]) -> int:
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


answers = st.lists(st.sampled_from(["the", " ", "fox", "a", "b", "é", "日本", "🙂", "\n", "."]), max_size=12).map(
    "".join
)
stops = st.lists(st.text("abox é日🙂.\n", min_size=1, max_size=4), max_size=3)


@settings(deadline=None, max_examples=150)
@given(answers, stops, st.integers(0, 2**20))
def test_an_answer_is_the_text_before_its_first_stop_string_however_it_is_split(text, stops, seed):
    # Of two stop strings the first to be complete counts; if one lies inside another that isn't the first to begin.
    assume(not any(inner in outer[1:] for inner in stops for outer in stops))
    first = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    answer, emitted, taken = AnswerText(BYTES, frozenset(), stops), "", b""
    for piece in some_split(text, seed):
        if answer.finished:
            break
        emitted, taken = emitted + answer.push(TOKEN_OF[piece]), taken + piece
        whole = taken.decode(errors="ignore")
        assert whole.startswith(emitted)
        if whole.encode() == taken and not answer.finished:
            assert emitted == whole[: len(whole) - longest_overlap(whole, stops)]
    assert answer.finished == (first < len(text))
    assert emitted + answer.flush() == text[:first]
    assert answer.flush() == ""


@pytest.mark.parametrize("stops", [["h", "e"], ["e", "h"]])
def test_of_two_stop_strings_in_one_token_the_first_counts(stops):
    (token,) = BYTES.encode(" the")
    answer = AnswerText(BYTES, frozenset(), stops)
    assert answer.push(token) == " t"
    assert answer.finished


@settings(deadline=None)
@given(st.lists(st.integers(0, len(TOKEN_OF) + len(SPECIAL) - 1), max_size=12))
def test_any_tokens_come_as_their_text(tokens):
    """Whatever a model writes: broken characters become replacement marks, special tokens nothing."""
    byte_of = {i: piece for piece, i in TOKEN_OF.items()}
    want = b"".join(byte_of.get(token, b"") for token in tokens).decode(errors="replace")
    answer = AnswerText(BYTES, frozenset(), ())
    emitted = "".join(answer.push(token) for token in tokens)
    assert want.startswith(emitted)
    assert emitted + answer.push(TOKEN_OF[b"."]) == want + "."


@pytest.mark.parametrize("name", ["metaspace", "prepend"])
def test_an_answer_of_word_marks_and_byte_tokens(name):
    tokenizer, text = TOKENIZERS[name], "The fox\nfound 鰻 and 🙂 there."
    answer = AnswerText(tokenizer, frozenset(), ())
    parts = [answer.push(token) for token in tokenizer.encode(text)]
    assert "".join(parts) + answer.flush() == text
    assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("end", ["<|end|>", "<|pad|>", " fox"])
def test_an_end_token_ends_the_answer_and_shows_no_text(end):
    ends = frozenset(t for s in ("<|end|>", "<|pad|>", " fox") for t in BYTES.encode_template(s)[-1:])
    answer = AnswerText(BYTES, ends, ["dog!"])
    for token in BYTES.encode("the do"):
        answer.push(token)
    assert not answer.finished
    assert answer.push(BYTES.encode_template(end)[-1]) == "do"
    assert answer.finished
    assert answer.flush() == ""


def test_flush_gives_what_a_stop_string_held_back():
    answer = AnswerText(BYTES, frozenset(), ["\n\nUser:"])
    emitted = "".join(answer.push(token) for token in BYTES.encode("Nobody.\n\nUs"))
    assert emitted == "Nobody."
    assert answer.flush() == "\n\nUs"
    assert answer.flush() == ""


def test_half_a_character_is_never_emitted():
    answer = AnswerText(BYTES, frozenset(), ())
    pieces = [TOKEN_OF[bytes([b])] for b in "é鰻".encode()]
    assert [answer.push(token) for token in pieces[:-1]] == ["", "é", "", ""]
    assert answer.flush() == ""
