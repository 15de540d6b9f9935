"""From records to streams: documents, conversations, instructions; and tasks, which are made.

Shape: T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from segcore.tasks.base import Item, Turn
from segcore.text import ChatFormat, TextTokenizer
from segcore.training.stream import IGNORED, TrainingStream
from segcore.turns import Conversation, lay_out
from services.training.records import Fault, Record

_SPACE = re.compile(r"\s+(?=\S)")


@dataclass(frozen=True)
class Document:
    """A text. whole: its end is in it, so that the end is learnt too."""

    text: str
    whole: bool = True


@dataclass(frozen=True)
class Chat:
    """system: a message, or None for what the template says without one. turns: users' texts and their answers."""

    system: str | None
    turns: tuple[tuple[tuple[str, ...], str], ...]

    @property
    def chars(self) -> int:
        return sum(len(text) for asked, answer in self.turns for text in (*asked, answer)) + len(self.system or "")


def documents(text: str, most_chars: int | None) -> list[Document]:
    """A text in pieces of at most so many characters, cut between two words where there are any. Raises Fault."""
    if not text.strip():
        raise Fault("it is empty")
    _check_text(text)
    pieces, start = [], 0
    while most_chars is not None and len(text) - start > most_chars:
        gaps = [m.start() for m in _SPACE.finditer(text, start + most_chars // 2, start + most_chars + 1)]
        end = gaps[-1] if gaps else start + most_chars
        pieces.append(Document(text[start:end], whole=False))
        start = end
    return [*pieces, Document(text[start:])]


def chat_of_messages(messages: Any) -> Chat:
    """From a list of {"role", "content"}. Users' texts in a row are one turn. Raises Fault."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not all(map(_is_message, messages)):
        raise Fault('its messages aren\'t a list of {"role": ..., "content": TEXT}')
    roles = [message["role"] for message in messages]
    if unknown := set(roles) - {"system", "user", "assistant"}:
        raise Fault(f"there is no room for messages of {', '.join(sorted(map(str, unknown)))}")
    if "system" in roles[1:]:
        raise Fault("its system message isn't the first")
    system = messages[0]["content"] if roles and roles[0] == "system" else None
    asked: list[str] = []
    turns: list[tuple[tuple[str, ...], str]] = []
    for message in messages[system is not None :]:
        if message["role"] == "user":
            asked.append(message["content"])
        elif not asked:
            raise Fault("an answer follows no question")
        else:
            turns.append((tuple(asked), message["content"]))
            asked = []
    return _checked(Chat(system, tuple(turns)))


def chat_of_fields(record: Record, prompt: Sequence[str], answer: str) -> Chat:
    """From fields: those of the user's turn, of which empty ones are left out, and the answer's. Raises Fault."""
    texts = [_text(record, name) for name in prompt]
    asked = tuple(text for text in texts if text.strip())
    return _checked(Chat(None, ((asked, _text(record, answer)),)))


def _text(record: Record, name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Fault(f"its {name} is {type(value).__name__}, not text")
    return value


def document_text(record: Record, name: str) -> str:
    """Raises Fault."""
    if name not in record:
        raise Fault(f"it has no {name!r}, but {', '.join(sorted(record)) or 'nothing'}")
    return _text(record, name)


def _check_text(text: str) -> None:
    """Raise Fault for what JSON can write and is no text."""
    if "\0" in text:
        raise Fault("it holds NUL: this isn't text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Fault("it holds half of a surrogate pair: this isn't text") from None


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("content"), str) and "role" in message


def _checked(chat: Chat) -> Chat:
    if not chat.turns:
        raise Fault("it has no answer")
    for asked, answer in chat.turns:
        if not answer.strip() or not any(text.strip() for text in asked):
            raise Fault("a question or an answer is empty")
    for text in (chat.system or "", *(text for asked, answer in chat.turns for text in (*asked, answer))):
        _check_text(text)
    return chat


class StreamMaker:
    """Makes streams of a model's tokens."""

    def __init__(self, text: TextTokenizer) -> None:
        self.text, self.chat = text, ChatFormat.of(text)
        end = text.tokenizer.eos_token_id
        self._end = end if isinstance(end, int) else None
        # What the tokenizer puts before any text, such as a beginning-of-sequence token.
        added = text.tokenizer("", verbose=False)["input_ids"]
        self._head = [token for token in added if token != self._end]

    def document(self, name: str, document: Document) -> TrainingStream:
        """Every token is learnt, and the document's end."""
        tokens = [*self._head, *self.text.encode_pieces(document.text).tokens]
        if document.whole and self._end is not None:
            tokens.append(self._end)
        return TrainingStream(name, torch.tensor(tokens))

    def conversation(self, name: str, chat: Chat, answers_only: bool) -> TrainingStream:
        """A conversation with a mark before each answer."""
        laid = self._conversation(chat.system)
        for asked, answer in chat.turns:
            for text in asked[:-1]:
                laid.document(text)
            laid.ask(asked[-1])
            laid.answer(answer)
        return _stream(name, laid, answers_only)

    def item(self, name: str, item: Item, loss: str) -> TrainingStream:
        """A task's item, with what selectors are taught. loss: of "all", "answers", or their "values" alone; of all but
        the answers by what the model itself would say, "own"."""
        laid = self._conversation(None)
        needed = lay_out(item, laid)
        taught = {mark: spans for mark, spans in zip(laid.marks, needed, strict=True) if spans}
        if loss == "values":
            answers = zip(laid.answers, item.turns, strict=True)
            laid.answers = [run for where, turn in answers for run in self._values(laid.tokens, where, turn)]
        if loss != "own":
            return _stream(name, laid, loss != "all", taught)
        tokens_T = torch.tensor(laid.tokens)
        labels_T = tokens_T.clone()
        for answer in laid.answers:
            labels_T[answer.start : answer.stop] = IGNORED
        return TrainingStream(name, tokens_T, labels_T, tuple(laid.marks), taught, distilled=True)

    def _values(self, tokens: list[int], answer: range, turn: Turn) -> list[range]:
        """The tokens of an answer that have characters of what it must hold."""
        decode = self.text.tokenizer.decode
        ends = [len(decode(tokens[answer.start : stop])) for stop in range(answer.start, answer.stop + 1)]
        text, runs = str(decode(tokens[answer.start : answer.stop])), []
        for value in turn.expected:
            at = text.find(value)
            inside = [i for i in range(len(answer)) if at >= 0 and ends[i] < at + len(value) and ends[i + 1] > at]
            if inside:
                runs.append(range(answer.start + inside[0], answer.start + inside[-1] + 1))
        return runs

    def _conversation(self, system: str | None) -> Conversation:
        chat = self.chat if system is None else ChatFormat.of(self.text, system)
        return Conversation(self.text, chat, end_token=self._end)


def _stream(
    name: str,
    laid: Conversation,
    answers_only: bool,
    needed: dict[int, tuple[tuple[int, int], ...]] | None = None,
) -> TrainingStream:
    tokens_T = torch.tensor(laid.tokens)
    labels_T = None
    if answers_only:
        labels_T = torch.full_like(tokens_T, IGNORED)
        for answer in laid.answers:
            labels_T[answer.start : answer.stop] = tokens_T[answer.start : answer.stop]
    return TrainingStream(name, tokens_T, labels_T, tuple(laid.marks), needed or {})
