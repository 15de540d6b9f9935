"""Arms: what answers. An engine of this process, which runs the very passes that a service runs."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from segcore.config import CacheConfig, EngineConfig, SegmentConfig
from segcore.engine.engine import Engine
from segcore.errors import LimitExceeded
from segcore.reading import token_losses
from segcore.sampling import SamplingParams
from segcore.tasks.base import Item, Turn
from segcore.text import AnswerText
from segcore.turns import Conversation
from segcore.weights import LoadedModel
from services.evaluation.config import Lead
from services.evaluation.generation import generate


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer, and what it took.

    text: the lead not included. prompt_tokens, answer_tokens: of the stream. prefill_s, device_bytes: when the document
    had been run, once for all questions about it. first_token_s: from the question to the answer's first token.
    answer_s: from there to its end. past_bytes: at its end. recall: share of needed tokens that the answer's first pass
    could see, of those that reading cells see; None where it isn't known. retrieved: texts of what was retrieved, for
    people. truncated: the document was cut.
    """

    text: str
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    prefill_s: float | None = None
    first_token_s: float | None = None
    answer_s: float | None = None
    device_bytes: int | None = None
    past_bytes: int | None = None
    recall: float | None = None
    retrieved: list[str] = field(default_factory=list)
    truncated: bool = False


class Arm(Protocol):
    """Answers an item's turns, each as if it were the only one. Raises SegcoreError for what it can't answer.

    shared: other items have the same document, which may be kept for them.
    """

    def answers(
        self, item: Item, max_tokens: int, lead: Lead, truncate: bool, *, shared: bool = False
    ) -> list[Answer]: ...

    def close(self) -> None: ...


def asked(turn: Turn, lead: Lead) -> str:
    """The question as it is put."""
    return f"{turn.question} {turn.lead}" if lead == "question" and turn.lead else turn.question


@dataclass(frozen=True)
class _Document:
    """A document that has been run. session: of the engine. prefill_s, device_bytes: what that took."""

    session: str
    tokens: list[int]
    prefill_s: float = 0.0
    device_bytes: int = 0


class EngineArm:
    """A model under a policy, in an engine of its own. A document is run once for all questions about it.

    Questions are asked in forks of its session; the last one, after which nobody needs it, in the session itself.
    """

    def __init__(self, model: LoadedModel, segment: SegmentConfig, past_bytes: int) -> None:
        # Nothing is taken over from another document: each is prefilled, and timed.
        cache = CacheConfig(host_bytes=past_bytes, reuse=False)
        self._model, self._segment, self._past_bytes = model, segment, past_bytes
        self._device = model.lm.spec.device
        self._document: _Document | None = None
        config = EngineConfig(segment=segment, cache=cache, slots=2)
        if self._device.type == "cuda":
            config = replace(config, chunk_tokens=segment.segment_tokens)  # whole segments, the quickest by far
        self._engine = Engine(model.lm, model.identified(config))

    def close(self) -> None:
        self._engine.shutdown()

    def losses(self, text: str, tokens: int) -> list[float]:
        """Minus log likelihood of each of a text's first tokens but the very first, in nats."""
        self._let_go()
        head = self._model.chat.head if not self._model.chat.header else []  # such as a beginning-of-sequence token
        made = torch.tensor([*head, *self._model.tokenizer.encode_pieces(text).tokens][:tokens])
        found: list[float] = token_losses(self._model.lm, self._segment, made, past_bytes=self._past_bytes).tolist()
        return found

    def answers(self, item: Item, max_tokens: int, lead: Lead, truncate: bool, *, shared: bool = False) -> list[Answer]:
        stream = _Stream(self._model, item)
        if truncate:
            stream.cut(self._engine.max_stream_tokens, max_tokens, lead)
        longest = max(stream.length(turn, lead) for turn in item.turns) + max_tokens
        if longest > self._engine.max_stream_tokens:
            raise LimitExceeded(
                f"{longest} tokens, and the policy runs {self._engine.max_stream_tokens} at most",
                max_tokens=self._engine.max_stream_tokens,
            )
        kept = False
        try:
            document = self._read(stream.document)
            made = []
            for turn in range(len(item.turns)):
                forked = shared or turn + 1 < len(item.turns)
                made.append(self._answer(document, stream, turn, max_tokens, lead, forked=forked))
            kept = shared
        finally:
            if not kept:
                self._let_go()
        return made

    def _read(self, tokens: list[int]) -> _Document:
        """The document as it stands in the engine; it is run unless it is the latest one."""
        if self._document is None or self._document.tokens != tokens:
            self._let_go()
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)  # peaks are those of this document
            session, began = uuid.uuid4().hex, time.monotonic()
            self._engine.open(session)
            self._document = _Document(session, tokens)
            self._engine.append(session, tokens)
            self._engine.flush(session).result()
            took_s = time.monotonic() - began
            self._document = replace(self._document, prefill_s=took_s, device_bytes=self._peak_bytes())
        return self._document

    def _let_go(self) -> None:
        if self._document is not None:
            self._engine.close(self._document.session)
            self._document = None

    def _answer(
        self, document: _Document, stream: _Stream, turn: int, max_tokens: int, lead: Lead, *, forked: bool
    ) -> Answer:
        engine, session = self._engine, f"{document.session}-{turn}" if forked else document.session
        before, after = stream.question(stream.item.turns[turn], lead)
        text = AnswerText(self._model.tokenizer, self._model.end_tokens, ())
        if forked:
            engine.fork(document.session, session)
        try:
            made = generate(engine, session, before, after, SamplingParams(max_tokens=max_tokens), text)
            stats = engine.stats()
        finally:
            if forked:
                engine.close(session)
        length = len(stream.document) + len(before) + len(after)
        return Answer(
            text=made.text,
            prompt_tokens=length,
            answer_tokens=made.tokens,
            prefill_s=document.prefill_s,
            first_token_s=made.first_token_s,
            answer_s=made.answer_s,
            device_bytes=document.device_bytes,
            past_bytes=sum(stats.past_bytes.values()),
            recall=stream.recall(turn, made.retrieved, self._visible(length)),
            retrieved=stream.texts(made.retrieved),
            truncated=stream.truncated,
        )

    def _peak_bytes(self) -> int:
        """On a GPU, since the document began; elsewhere what the engine holds now."""
        on_gpu = self._device.type == "cuda"
        return torch.cuda.max_memory_allocated(self._device) if on_gpu else self._engine.stats().engine_bytes

    def _visible(self, length: int) -> range | None:
        """Tokens that reading cells see beside sinks and what was retrieved; None where cells see different things."""
        tail = getattr(self._segment, "reader_tail_tokens", None)
        if tail is None or not getattr(self._segment, "retrieved_tokens", 0):
            return None
        closed = length // self._segment.segment_tokens * self._segment.segment_tokens
        return range(max(0, closed - tail), length)


class _Stream:
    """An item as tokens of a model."""

    def __init__(self, model: LoadedModel, item: Item) -> None:
        self.item, self.truncated, self._model = item, False, model
        self._conversation = Conversation(model.tokenizer, model.chat)
        first, made = self._conversation.document(item.document)
        self.document = self._conversation.tokens
        self._needed = [
            [t for span in turn.needed for t in range(*(first + x for x in made.within(*span)))] for turn in item.turns
        ]

    def question(self, turn: Turn, lead: Lead) -> tuple[list[int], list[int]]:
        """The tokens before the mark and after it, a lead that begins the answer included."""
        asking = self._conversation.fork()
        asking.ask(asked(turn, lead))
        start, mark = len(self._conversation.tokens), asking.marks[0]
        begun = self._model.tokenizer.encode_continuation(turn.lead) if lead == "answer" else []
        return asking.tokens[start:mark], asking.tokens[mark:] + begun

    def length(self, turn: Turn, lead: Lead) -> int:
        before, after = self.question(turn, lead)
        return len(self.document) + len(before) + len(after)

    def cut(self, most: int, max_tokens: int, lead: Lead) -> None:
        """Leave out the document's middle, if the stream would be too long."""
        excess = max(self.length(turn, lead) for turn in self.item.turns) + max_tokens - most
        if excess > 0:
            half = (len(self.document) - excess) // 2
            self.document, self.truncated = self.document[:half] + self.document[half + excess :], True
            self._needed = [[] for _ in self._needed]  # they have moved

    def recall(self, turn: int, retrieved: list[int], visible: range | None) -> float | None:
        needed = self._needed[turn]
        if visible is None or not needed:
            return None
        seen = set(retrieved)
        return sum(token in seen or token in visible or token < 4 for token in needed) / len(needed)

    def texts(self, retrieved: list[int]) -> list[str]:
        """What adjacent tokens say, in stream order."""
        runs: list[list[int]] = []
        for token in retrieved:
            if runs and runs[-1][-1] + 1 == token:
                runs[-1].append(token)
            else:
                runs.append([token])
        decode, last = self._model.tokenizer.tokenizer.backend_tokenizer.decode, len(self.document)
        return [decode(self.document[run[0] : run[-1] + 1]) for run in runs if run[0] < last]


def as_record(answer: Answer) -> dict[str, Any]:
    """What is kept of an answer, as JSON can hold it. A recall of 0.0 is one, though it equals False."""
    return {name: value for name, value in vars(answer).items() if value not in (None, []) and value is not False}
