"""A running segcore service as something that answers items: for evaluation, through the client that people use."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from segcore.sampling import SamplingParams
from segcore.tasks.base import Item, Turn
from services.serving.client import Client

if TYPE_CHECKING:
    from services.evaluation.arms import Answer
    from services.evaluation.config import Lead


class ServedArm:
    """Raises Unavailable for a service that is gone."""

    def __init__(self, address: str) -> None:
        self._client = Client(address)

    def close(self) -> None:
        self._client.close()

    def answers(self, item: Item, max_tokens: int, lead: Lead, truncate: bool, *, shared: bool = False) -> list[Answer]:
        # What a service has run of a document it takes over by itself, so only the first turn's prefill is one.
        answers = [self._answer(item, turn, max_tokens, lead) for turn in item.turns]
        return [answers[0], *(replace(answer, prefill_s=None) for answer in answers[1:])]

    def _answer(self, item: Item, turn: Turn, max_tokens: int, lead: Lead) -> Answer:
        from services.evaluation.arms import Answer, asked

        session = self._client.create_session().session_id
        try:
            began = time.monotonic()
            uploaded = self._client.upload(session, item.document.encode())
            prefill_s = time.monotonic() - began
            began, text, first_s = time.monotonic(), "", None
            for part in self._client.generate(session, asked(turn, lead), SamplingParams(max_tokens=max_tokens)):
                if part.text and first_s is None:
                    first_s = time.monotonic() - began
                text += part.text
            progress = uploaded.progress
            return Answer(
                text=text,
                prompt_tokens=part.prompt_tokens,
                answer_tokens=part.answer_tokens,
                prefill_s=prefill_s,
                first_token_s=first_s,
                answer_s=None if first_s is None else time.monotonic() - began - first_s,
                device_bytes=progress.engine_bytes,
                past_bytes=progress.past_host_bytes,
            )
        finally:
            self._client.delete_session(session)
