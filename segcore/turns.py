"""A conversation about documents as one stream of tokens, the same that a service would run for it.

Training and evaluation lay out their streams here: head, document, question, MARK, assistant header, answer, and so on.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field

from segcore.tasks.base import Item
from segcore.text import ChatFormat, TextTokenizer, Tokens


@dataclass
class Conversation:
    """Its tokens as it grows. marks: indices of the tokens that follow an end of turn. answers: tokens of each answer
    that was given, the one that ends it included.

    end_token: what ends an answer where the chat format has nothing for it.
    """

    text: TextTokenizer
    chat: ChatFormat
    end_token: int | None = None
    tokens: list[int] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    answers: list[range] = field(default_factory=list)
    _turn_open: bool = False

    def fork(self) -> Conversation:
        """One that goes on from here by itself."""
        twin = copy(self)
        twin.tokens, twin.marks, twin.answers = self.tokens.copy(), self.marks.copy(), self.answers.copy()
        return twin

    def document(self, text: str) -> tuple[int, Tokens]:
        """Add a document to the user's turn; where its tokens begin, and what they are."""
        self.tokens += self._opening()
        first, made = len(self.tokens), self.text.encode_pieces(text)
        self.tokens += made.tokens
        self._turn_open = True
        return first, made

    def ask(self, question: str) -> None:
        """Add a question, the end of the user's turn, its mark, and the assistant's header."""
        encode = self.text.encode_continuation if self._turn_open else self.text.encode
        before, after = self.chat.prompt_tail([*self._opening(), *encode(question)])
        self.tokens += before
        self.marks.append(len(self.tokens))
        self.tokens += after
        self._turn_open = False

    def answer(self, text: str) -> None:
        """Add an answer that ended by itself."""
        first = len(self.tokens)
        self.tokens += self.text.encode_continuation(text if self.chat.header else f" {text}")
        if self.chat.end_of_answer:
            self.tokens.append(self.chat.end_of_answer[0])
        elif self.end_token is not None:
            self.tokens.append(self.end_token)
        self.answers.append(range(first, len(self.tokens)))

    def _opening(self) -> list[int]:
        """The tokens before a text: those that open a user's turn, or that part it from the text before."""
        if self._turn_open:
            return self.chat.separator
        return self.chat.reopen(self.tokens[-1]) if self.tokens else self.chat.head


def frame_tokens(text: TextTokenizer, chat: ChatFormat) -> tuple[int, int]:
    """Tokens that the chat format adds to a stream, and to each of its turns; for `Room`."""
    return len(chat.head), len(chat.end_of_user) + len(chat.header) + len(chat.end_of_answer) + 2


def lay_out(item: Item, conversation: Conversation) -> list[tuple[tuple[int, int], ...]]:
    """Add an item, answers included, to an empty conversation; of each turn, the tokens [first, stop) that it needs."""
    first, made = conversation.document(item.document)
    for turn in item.turns:
        conversation.ask(turn.question)
        conversation.answer(turn.answer)
    return [
        tuple((first + a, first + b) for a, b in (made.within(*span) for span in turn.needed)) for turn in item.turns
    ]
