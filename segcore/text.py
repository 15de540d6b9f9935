"""Between text and tokens: documents in pieces, chat templates with turn marks, answers as they grow.

The engine sees tokens only; services, training and evaluation all come through here, so they agree on every token.
"""

from __future__ import annotations

import codecs
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, NamedTuple, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from segcore.errors import InvalidDocument, InvalidRequest, UnsupportedModel

# Documents are tokenised in pieces of about this many characters.
PIECE_CHARS = 4096
# A piece ends before a single space between two letters or digits. Byte-level BPE starts a new word there whatever
# follows, so pieces yield the tokens of the whole text.
_WORD_GAP = re.compile(r"(?<=[^\W_])(?= [^\W_])")


class Tokens(NamedTuple):
    """Tokens of a text, and the characters [start, end) of each, ascending."""

    tokens: list[int]
    starts: list[int]
    ends: list[int]

    def within(self, start: int, end: int) -> tuple[int, int]:
        """The tokens [first, stop) that hold any of the characters [start, end)."""
        return bisect_right(self.ends, start), bisect_left(self.starts, end)


class TextTokenizer:
    """A transformers tokenizer for text that may hold anything: special tokens are never read out of a document."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise UnsupportedModel(
                f"{type(tokenizer).__name__}: only tokenizers of the 'tokenizers' library stream text"
            )
        self.tokenizer = tokenizer
        self._continuation = _without_word_mark(tokenizer.backend_tokenizer)
        self._opening = _plain(json.loads(tokenizer.backend_tokenizer.to_str()))

    @property
    def digest(self) -> str:
        """A hash of everything that turns text into tokens."""
        return blake2b(self.tokenizer.backend_tokenizer.to_str().encode(), digest_size=20).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; nothing is added, and the names of special tokens are ordinary text."""
        return self._opening.encode(text, add_special_tokens=False).ids

    def encode_continuation(self, text: str) -> list[int]:
        """Tokens of a text that continues another one."""
        return self._continuation.encode(text, add_special_tokens=False).ids

    def encode_pieces(self, text: str) -> Tokens:
        """Tokens of a whole document, as `DocumentEncoder` makes them of its bytes, and the characters of each."""
        tokens, starts, ends = [], [], []
        first = 0
        while first < len(text):
            stop = _piece_end(text, first) or len(text)
            backend = self._continuation if first else self._opening
            made = backend.encode(text[first:stop], add_special_tokens=False)
            tokens += made.ids
            starts += [first + start for start, _ in made.offsets]
            ends += [first + end for _, end in made.offsets]
            first = stop
        return Tokens(tokens, starts, ends)

    def decode_token(self, token: int) -> str:
        """A token's text by itself; where it is a part of a character, the replacement sign."""
        return cast(str, self.tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False))

    def encode_template(self, text: str) -> list[int]:
        """Tokens of a chat template's own text: special tokens count as such."""
        return cast(list[int], self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _without_word_mark(backend: Tokenizer) -> Tokenizer:
    """The same tokenizer, but for text in the middle: no word mark is put before what it is given."""

    def middle(part: Any) -> Any:
        if isinstance(part, list):
            return [middle(p) for p in part if not (isinstance(p, dict) and p.get("type") == "Prepend")]
        if not isinstance(part, dict):
            return part
        changed = {name: middle(value) for name, value in part.items()}
        if part.get("type") == "Metaspace":
            changed["prepend_scheme"] = "never"
        if part.get("type") == "ByteLevel":
            changed["add_prefix_space"] = False
        return changed

    parts = json.loads(backend.to_str())
    for name in ("normalizer", "pre_tokenizer"):
        part = parts[name]
        parts[name] = None if part is not None and part["type"] == "Prepend" else middle(part)
    return _plain(parts)


def _plain(parts: dict[str, Any]) -> Tokenizer:
    """A tokenizer of these parts that takes all of a text, and takes it for text."""
    made = Tokenizer.from_str(json.dumps(parts))
    made.encode_special_tokens = True
    made.no_truncation()
    made.no_padding()
    return made


def _piece_end(text: str, start: int) -> int | None:
    """Where the piece that begins at `start` ends; None if more text might follow in it."""
    # The gap's right neighbour is looked at too, hence one character more than a piece's longest extent.
    if len(text) - start < PIECE_CHARS + 2:
        return None
    gaps = [m.start() for m in _WORD_GAP.finditer(text, start + 1, start + PIECE_CHARS + 2)]
    return gaps[-1] if gaps else start + PIECE_CHARS


class DocumentEncoder:
    """Turns the bytes of a UTF-8 document into tokens as they arrive. The tokens depend on the bytes alone."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._text = ""
        self._started = False
        self.bytes_taken = 0

    @classmethod
    def continued(cls, tokenizer: TextTokenizer, bytes_taken: int, held: bytes) -> DocumentEncoder:
        """The encoder that has taken so many bytes, of which the last ones, `held`, aren't tokens yet."""
        encoder = cls(tokenizer)
        encoder._text, encoder.bytes_taken = encoder._decoder.decode(held), bytes_taken
        encoder._started = bytes_taken > len(held)
        return encoder

    @property
    def bytes_held(self) -> int:
        """How many of the bytes taken, the last ones, aren't tokens yet."""
        return len(self._text.encode()) + len(self._decoder.getstate()[0])

    @property
    def most_tokens_held(self) -> int:
        """How many tokens, at most, are still to come from the bytes taken: a token has at least one byte."""
        return len(self._text.encode())

    def fork(self) -> DocumentEncoder:
        """An independent encoder that has taken the same bytes; feed it to try bytes out."""
        twin = DocumentEncoder(self._tokenizer)
        twin._decoder.setstate(self._decoder.getstate())
        twin._text, twin._started, twin.bytes_taken = self._text, self._started, self.bytes_taken
        return twin

    def feed(self, data: bytes) -> list[int]:
        """Take more bytes; returns the tokens that are now certain.

        Raises InvalidDocument for bytes that aren't UTF-8 or hold NUL; the encoder is then of no further use.
        """
        nul = data.find(b"\0")
        if nul >= 0:
            raise InvalidDocument(
                f"byte {self.bytes_taken + nul} is NUL: this is a binary file, not text; extract its text first",
                byte_offset=self.bytes_taken + nul,
            )
        incomplete = len(self._decoder.getstate()[0])
        try:
            self._text += self._decoder.decode(data)
        except UnicodeDecodeError as error:
            at = self.bytes_taken - incomplete + error.start
            raise InvalidDocument(
                f"byte {at} isn't valid UTF-8 ({error.reason}); convert the document to UTF-8 first", byte_offset=at
            ) from None
        self.bytes_taken += len(data)
        return self._take_pieces()

    def finish(self) -> list[int]:
        """The remaining tokens. Raises InvalidDocument if the document is empty or ends inside a character."""
        if self.bytes_taken == 0:
            raise InvalidDocument("the document is empty")
        unfinished = len(self._decoder.getstate()[0])
        if unfinished:
            raise InvalidDocument(
                f"the document ends inside a UTF-8 character, {unfinished} byte(s) before its end; is it cut off?",
                byte_offset=self.bytes_taken - unfinished,
            )
        text, self._text = self._text, ""
        return self._encode(text) if text else []

    def _take_pieces(self) -> list[int]:
        tokens: list[int] = []
        start = 0
        while (end := _piece_end(self._text, start)) is not None:
            tokens += self._encode(self._text[start:end])
            start = end
        self._text = self._text[start:]
        return tokens

    def _encode(self, piece: str) -> list[int]:
        encode = self._tokenizer.encode_continuation if self._started else self._tokenizer.encode
        self._started = True
        return encode(piece)


@dataclass(frozen=True)
class ChatFormat:
    """A chat template as token lists, cut where contents and turn marks go.

    A stream reads: head, user's text, end_of_user, MARK, header, answer, end_of_answer, user's text, and so on. The
    mark stands before the assistant header, since the position that predicts the first answer token must be computed
    after the refresh (design, section 6). Without a template all but `head` are empty, and the mark stands before the
    last token of the user's text.
    """

    head: list[int]
    end_of_user: list[int]
    header: list[int]
    end_of_answer: list[int]
    separator: list[int]

    @classmethod
    def of(cls, text: TextTokenizer, system: str | None = None) -> ChatFormat:
        """Read the format off the tokenizer's chat template; with a system message, or what the template has for none.

        Raises UnsupportedModel if the template rewrites texts, or has no room for a system message.
        """
        tokenizer, separator = text.tokenizer, text.encode_continuation("\n\n")
        if tokenizer.chat_template is None:
            bare = cls.bare(text)
            return bare if system is None else replace(bare, head=[*bare.head, *text.encode(system), *separator])
        zero, one, answer, two = "<<segcore-0>>", "<<segcore-1>>", "<<segcore-2>>", "<<segcore-3>>"
        first = [] if system is None else [_message("system", zero)]
        opened = [*first, _message("user", one)]
        whole = _render(tokenizer, [*opened, _message("assistant", answer), _message("user", two)], False)
        prompt, closed = _render(tokenizer, opened, True), _render(tokenizer, opened, False)
        marks = (*(message["content"] for message in first), one, answer, two)
        if not (prompt.startswith(closed) and all(whole.count(mark) == 1 for mark in marks)):
            raise UnsupportedModel("the model's chat template rewrites its messages, so it can't be fed as a stream")
        before, _, after = prompt.split(one)[0].rpartition(zero)
        return cls(
            head=[
                *(text.encode_template(before) if before else []),
                *text.encode_continuation(system or ""),
                *text.encode_template(after),
            ],
            end_of_user=text.encode_template(closed.split(one)[1]),
            header=text.encode_template(prompt[len(closed) :]),
            end_of_answer=text.encode_template(whole.split(answer)[1].split(two)[0]),
            separator=separator,
        )

    @classmethod
    def bare(cls, text: TextTokenizer) -> ChatFormat:
        """Without a template: texts as they are, behind what the tokenizer begins every text with."""
        added = cast(list[int], text.tokenizer("", verbose=False)["input_ids"])
        head = [token for token in added if token != text.tokenizer.eos_token_id]
        return cls(head, [], [], [], text.encode_continuation("\n\n"))

    def prompt_tail(self, question: Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens before and after the turn mark that end a user's turn with `question`."""
        turn = [*question, *self.end_of_user]
        return (turn, self.header) if self.header else (turn[:-1], turn[-1:])

    def reopen(self, last_token: int | None) -> list[int]:
        """The tokens from an answer that ended with `last_token` to the next user's text."""
        if self.end_of_answer and self.end_of_answer[0] == last_token:
            return self.end_of_answer[1:]
        return self.end_of_answer


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generation_prompt: bool) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    return cast(str, text)


def check_question(question: str) -> None:
    """Raise InvalidRequest for a question that holds nothing, or what isn't text."""
    if not question.strip():
        raise InvalidRequest("the question is empty", field="question")
    if "\0" in question:
        raise InvalidRequest("the question holds a NUL character", field="question")


class AnswerText:
    """Detokenises an answer token by token; ends it at an end token or before a stop string.

    Emits whole characters only, and holds back text that may turn out to begin a stop string.
    """

    def __init__(self, tokenizer: TextTokenizer, end_tokens: frozenset[int], stop: Sequence[str]) -> None:
        self._backend = tokenizer.tokenizer.backend_tokenizer
        self._tokens: list[int] = []
        self._shown, self._read = 0, 0  # tokens [shown, read) give the context in which the rest is decoded
        self._end_tokens, self._stop = end_tokens, stop
        self._held = ""
        self.finished = False

    def push(self, token: int) -> str:
        """The text that `token` makes certain; sets `finished` when the answer ends with it."""
        if token in self._end_tokens:
            self.finished = True
            return self.flush()
        self._tokens.append(token)
        self._held += self._decode(whole=False)
        # The first to be complete counts, so that the answer doesn't depend on how tokens cut it.
        found = [(i + len(s), i) for s in self._stop if (i := self._held.find(s)) >= 0]
        if found:
            self.finished = True
            text, self._held = self._held[: min(found)[1]], ""
            return text
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """What was held back, when no more tokens come; a character that was cut off is left out."""
        text, self._held = self._held + self._decode(whole=True), ""
        return text

    def _decode(self, *, whole: bool) -> str:
        """The text of the tokens not yet read; nothing if it ends inside a character, unless it is to end there.

        Decoded behind a few earlier tokens, since a token's text can depend on its neighbours.
        """
        before = self._backend.decode(self._tokens[self._shown : self._read])
        text: str = self._backend.decode(self._tokens[self._shown :])[len(before) :]
        if text.endswith("\ufffd"):
            if not whole:
                return ""
            text = text.rstrip("\ufffd")
        self._shown, self._read = self._read, len(self._tokens)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
