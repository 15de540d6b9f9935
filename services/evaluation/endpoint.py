"""An arm that asks an OpenAI-compatible endpoint, such as another engine's server."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import requests

from segcore.errors import ConfigError, InvalidRequest, LimitExceeded, Unavailable
from segcore.tasks.base import Item, Turn
from services.evaluation.arms import Answer, asked
from services.evaluation.config import ArmSection, Lead

RETRY_S = (1.0, 4.0)
# No tokenizer's tokens have more on average: where a prompt's have, the endpoint has read a part of it.
CHARACTERS = 8


class EndpointArm:
    """Chat completions, greedy, streamed. Raises Unavailable for an endpoint that is gone, ConfigError for one that
    doesn't have the model, LimitExceeded for one that cuts prompts by itself, unless they may be cut."""

    def __init__(self, section: ArmSection) -> None:
        assert section.url is not None
        self._url, self._model, self._timeout_s = section.url.rstrip("/"), section.served_model, section.timeout_s
        self._session = requests.Session()
        if section.key_variable is not None:
            if section.key_variable not in os.environ:
                raise ConfigError(f"arm {section.name!r}: the environment has no {section.key_variable}")
            self._session.headers["Authorization"] = f"Bearer {os.environ[section.key_variable]}"
        try:
            self._check_model()
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        self._session.close()

    def _check_model(self) -> None:
        models = [model.get("id") for model in self._json("/models").get("data", [])]
        if self._model not in models:
            raise ConfigError(f"{self._url} serves {', '.join(map(str, models)) or 'nothing'}, and not {self._model!r}")

    def answers(self, item: Item, max_tokens: int, lead: Lead, truncate: bool, *, shared: bool = False) -> list[Answer]:
        return [self._answer(item, turn, max_tokens, lead, truncate) for turn in item.turns]

    def _answer(self, item: Item, turn: Turn, max_tokens: int, lead: Lead, truncate: bool) -> Answer:
        prompt = f"{item.document}\n\n{asked(turn, lead)}"
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        usage: dict[str, Any] = {}
        began, first_s, text = time.monotonic(), None, ""
        for event in self._events("/chat/completions", body):
            usage = event.get("usage") or usage
            for choice in event.get("choices", []):
                if part := choice.get("delta", {}).get("content"):
                    first_s, text = first_s or time.monotonic() - began, text + part
        read = usage.get("prompt_tokens")
        cut = read is not None and CHARACTERS * read < len(prompt)
        if cut and not truncate:
            raise LimitExceeded(f"{self._url} read {read} tokens of a prompt of {len(prompt)} characters: it cuts them")
        return Answer(
            text=text,
            truncated=cut,
            prompt_tokens=read,
            answer_tokens=usage.get("completion_tokens"),
            first_token_s=first_s,  # the document's prefill included
            answer_s=None if first_s is None else time.monotonic() - began - first_s,
        )

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What a stream of server-sent events holds. One that ends early is an error."""
        with self._response(path, body) as response:
            try:
                for line in response.iter_lines(chunk_size=1):
                    data = line.decode().strip().removeprefix("data:").strip()
                    if data == "[DONE]":
                        return
                    if data.startswith("{"):
                        yield json.loads(data)
            except (requests.RequestException, ValueError) as error:
                raise Unavailable(f"{self._url}{path} broke off: {error}") from error
        raise Unavailable(f"{self._url}{path} ended its answer without saying so")

    def _json(self, path: str) -> dict[str, Any]:
        with self._response(path) as response:
            try:
                return dict(response.json())
            except (requests.RequestException, ValueError, TypeError) as error:
                raise ConfigError(f"{self._url}{path} doesn't answer as OpenAI's would: {error}") from error

    def _response(self, path: str, body: dict[str, Any] | None = None) -> requests.Response:
        """The response, after some attempts. Raises InvalidRequest for what it refuses, else Unavailable."""
        failure: object = None
        for wait_s in (*RETRY_S, 0.0):
            try:
                response = self._session.request(
                    "GET" if body is None else "POST", self._url + path, json=body, stream=True, timeout=self._timeout_s
                )
            except requests.RequestException as error:
                failure = error
            else:
                if response.ok:
                    return response
                with response:
                    failure = f"{response.status_code}: {response.text[:2000]}"
                if response.status_code < 500 and response.status_code not in (408, 429):
                    raise InvalidRequest(f"{self._url}{path} answers {failure}")
            time.sleep(wait_s)
        raise Unavailable(f"{self._url}{path} doesn't answer: {failure}")
