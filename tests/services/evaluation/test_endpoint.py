"""The arm that asks an OpenAI-compatible endpoint: a server of this test's, with its moods."""

from __future__ import annotations

import dataclasses
import json
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from segcore.errors import ConfigError, InvalidRequest, LimitExceeded, Unavailable
from segcore.tasks.base import Item, Turn
from services.evaluation import endpoint
from services.evaluation.config import ArmSection
from services.evaluation.endpoint import EndpointArm

ITEM = Item(
    name="x",
    task="x",
    document="A document.",
    turns=(Turn(question="Why?", answer="", expected=(), lead="It is"), Turn(question="How?", answer="", expected=())),
)


class Handler(BaseHTTPRequestHandler):
    """moods: what the next requests for completions meet; then "good"."""

    moods: ClassVar[list[str]] = []
    asked: ClassVar[list[dict]] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply(200, {"data": [{"id": "a-model"}]} if self.path == "/v1/models" else {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body | {"key": self.headers["Authorization"]})
        mood = self.moods.pop(0) if self.moods else "good"
        if mood in ("400", "500", "429"):
            return self.reply(int(mood), {"error": "context length exceeded"})
        if mood == "slow":
            threading.Event().wait(1)
            return None
        self.send_response(200)
        self.end_headers()
        for word in ("Be", "cause"):
            self.event({"choices": [{"delta": {"content": word}}]})
        if mood != "short":
            read = 3 if mood == "cuts" else len(body["messages"][0]["content"]) // 4
            self.event({"choices": [], "usage": {"prompt_tokens": read, "completion_tokens": 2}})
            self.wfile.write(b"data: [DONE]\n\n")
        return None

    def event(self, value):
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

    def reply(self, status, value):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(endpoint, "RETRY_S", (0.0, 0.0))
    Handler.moods, Handler.asked = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def arm(url, **changes):
    return EndpointArm(ArmSection(**({"name": "x", "url": url, "served_model": "a-model"} | changes)))


def test_turns_are_asked_one_by_one_and_greedily(url):
    with closing(arm(url)) as opened:
        first, second = opened.answers(ITEM, 9, "question", False)
    assert (first.text, first.prompt_tokens, first.answer_tokens) == ("Because", 5, 2)
    assert first.first_token_s > 0
    assert [body["messages"] for body in Handler.asked] == [
        [{"role": "user", "content": "A document.\n\nWhy? It is"}],
        [{"role": "user", "content": "A document.\n\nHow?"}],
    ]
    assert all(body["temperature"] == 0 and body["max_tokens"] == 9 for body in Handler.asked)
    assert second.text == "Because"


def test_an_endpoint_in_trouble_is_asked_again(url):
    Handler.moods = ["500", "429", "good"]
    with closing(arm(url)) as opened:
        assert opened.answers(ITEM, 9, "none", False)[0].text == "Because"


@pytest.mark.parametrize(
    ("moods", "error", "message"),
    [
        (["400"], InvalidRequest, "answers 400: .*context length"),
        (["500"] * 3, Unavailable, "doesn't answer"),
        (["short"], Unavailable, "ended its answer"),
        (["slow"] * 3, Unavailable, "doesn't answer|broke off"),
    ],
)
def test_what_goes_wrong_is_told(url, moods, error, message):
    Handler.moods = moods
    with closing(arm(url, timeout_s=0.3)) as opened, pytest.raises(error, match=message):
        opened.answers(ITEM, 9, "none", False)


def test_a_prompt_that_was_cut_is_an_error_unless_it_may_be(url):
    long = dataclasses.replace(ITEM, document="A document. " * 20)
    Handler.moods = ["cuts", "cuts", "cuts"]
    with closing(arm(url)) as opened:
        with pytest.raises(LimitExceeded, match="read 3 tokens of a prompt of 246 characters"):
            opened.answers(long, 9, "none", False)
        assert [answer.truncated for answer in opened.answers(long, 9, "none", True)] == [True, True]
        assert [answer.truncated for answer in opened.answers(long, 9, "none", True)] == [False, False]


def test_an_endpoint_without_the_model_is_refused(url):
    with pytest.raises(ConfigError, match="serves a-model, and not 'b-model'"):
        arm(url, served_model="b-model")


def test_an_endpoint_that_is_gone_is_told(url):
    with pytest.raises(Unavailable, match="doesn't answer"):
        arm("http://127.0.0.1:9/v1")


def test_a_key_comes_from_the_environment(url, monkeypatch):
    with pytest.raises(ConfigError, match="no SOME_KEY"):
        arm(url, key_variable="SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "abc")
    with closing(arm(url, key_variable="SOME_KEY")) as opened:
        opened.answers(ITEM, 9, "none", False)
    assert Handler.asked[0]["key"] == "Bearer abc"
