"""The OpenAI-compatible face, through its official client."""

from __future__ import annotations

import http.client
import json

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a stream of tokens?"}]
CHAT = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def served(front):
    return front()


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.http}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(client):
    (only,) = client.models.list()
    return only.id


def test_the_model_is_listed_and_no_other_is_there(client, model):
    assert client.models.retrieve(model).object == "model"
    with pytest.raises(openai.NotFoundError, match="isn't served here"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", **CHAT)
    assert caught.value.param == "model"


def test_a_chat_streamed_is_the_chat_at_once(client, model):
    whole = client.chat.completions.create(model=model, **CHAT)
    assert whole.choices[0].finish_reason in ("length", "stop")
    assert whole.usage.completion_tokens <= 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(model=model, stream=True, stream_options={"include_usage": True}, **CHAT)
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert not chunks[-1].choices


def test_a_conversation_goes_on_and_the_system_message_counts(client, model):
    def usage(messages):
        made = client.chat.completions.create(model=model, messages=messages, max_tokens=1, temperature=0)
        return made.usage.prompt_tokens

    longer = [*MESSAGES, {"role": "assistant", "content": "Words."}, {"role": "user", "content": "And then?"}]
    assert usage(MESSAGES[1:]) < usage(MESSAGES) < usage(longer)


def test_seeds_repeat_an_answer_and_no_seed_does_not(client, model):
    def answer(**more):
        asked = CHAT | {"temperature": 2, "max_tokens": 16} | more
        return client.chat.completions.create(model=model, **asked).choices[0].message.content

    assert answer(seed=5) == answer(seed=5) != answer(seed=6)
    assert answer(seed=-1) == answer(seed=-1)
    assert answer() != answer()


def test_an_answer_ends_before_a_stop_string(client, model):
    whole = client.chat.completions.create(model=model, **CHAT).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    cut = client.chat.completions.create(model=model, stop=[stop], **CHAT)
    assert cut.choices[0].message.content == whole[: whole.find(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_log_probabilities_are_the_models(client, model):
    made = client.chat.completions.create(model=model, logprobs=True, top_logprobs=3, **CHAT)
    content = made.choices[0].logprobs.content
    assert len(content) == made.usage.completion_tokens
    for token in content:  # greedy: the likeliest is what was said
        assert token.logprob == pytest.approx(max(top.logprob for top in token.top_logprobs))
        assert token.top_logprobs[0].token == token.token
        assert len(token.top_logprobs) == 3
        assert token.logprob < 0
    chunks = client.chat.completions.create(model=model, logprobs=True, top_logprobs=3, stream=True, **CHAT)
    streamed = [token for chunk in chunks for token in chunk.choices[0].logprobs.content]
    assert streamed == content
    assert client.chat.completions.create(model=model, **CHAT).choices[0].logprobs is None


def test_a_text_is_completed(client, model):
    asked = {"model": model, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 6}
    whole = client.completions.create(logprobs=2, **asked)
    assert whole.usage.prompt_tokens == 15  # " a" is one token: no template's are among them
    assert whole.choices[0].logprobs.text_offset[0] == 0
    assert len(whole.choices[0].logprobs.top_logprobs[0]) == 2
    streamed = client.completions.create(stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
    by_tokens = client.completions.create(**(asked | {"prompt": [ord(c) for c in "Once"]}))
    assert by_tokens.usage.prompt_tokens == 4
    assert client.completions.create(**(asked | {"prompt": "O"})).usage.prompt_tokens == 1


def test_a_session_takes_only_what_is_new(client, model, served):
    session = client.post("/sessions", body={}, cast_to=object)["session_id"]
    asked = {"model": model, "max_tokens": 4, "temperature": 0, "extra_body": {"session_id": session}}
    first = client.chat.completions.create(messages=MESSAGES[1:], **asked)
    second = client.chat.completions.create(messages=[{"role": "user", "content": "And then?"}], **asked)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + len("And then?")
    again = [MESSAGES[1], {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    for messages in (MESSAGES, again):
        with pytest.raises(openai.BadRequestError, match="its own past"):
            client.chat.completions.create(messages=messages, **asked)
    with pytest.raises(openai.NotFoundError, match="create it first"):
        client.chat.completions.create(messages=MESSAGES[1:], **(asked | {"extra_body": {"session_id": "none"}}))


def streamed(client, **asked):
    return "".join(chunk.choices[0].delta.content for chunk in client.chat.completions.create(stream=True, **asked))


def said(client, **asked):
    return client.chat.completions.create(**asked).choices[0].message.content


@pytest.mark.parametrize("in_session", [True, False])
def test_a_request_made_again_is_answered_alike(client, model, in_session):
    """At once or as a stream, though it has no seed; under its id nothing else is answered."""
    session = {"session_id": client.post("/sessions", body={}, cast_to=object)["session_id"]} if in_session else {}
    again = {"model": model, "messages": MESSAGES[1:], "max_tokens": 12, "temperature": 2}
    again["extra_body"] = {"request_id": f"again-{in_session}", **session}
    first, second = (client.chat.completions.create(**again) for _ in "12")
    assert first.model_dump(exclude={"created"}) == second.model_dump(exclude={"created"})
    assert streamed(client, **again) == first.choices[0].message.content
    for other in ({"temperature": 1}, {"messages": [{"role": "user", "content": "What?"}]}):
        for stream in (False, True):
            with pytest.raises(openai.ConflictError, match="another call") as caught:
                client.chat.completions.create(**(again | other | {"stream": stream}))
            assert set(caught.value.body) == {"message", "type", "param", "code"}
    other = again | {"extra_body": {"request_id": f"other-{in_session}", **session}}
    assert said(client, **other) != first.choices[0].message.content
    if in_session:
        assert len(client.get(f"/sessions/{session['session_id']}", cast_to=object)["points"]) == 2


def test_a_text_completed_again_is_the_same(client, model):
    asked = {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "extra_body": {"request_id": "text"}}
    first, second = (client.completions.create(**asked) for _ in "12")
    assert (first.id, first.choices) == (second.id, second.choices)
    with pytest.raises(openai.ConflictError):
        client.completions.create(**(asked | {"prompt": "Twice"}))


class Lossy(httpx2.HTTPTransport):
    """Carries requests out; the answer to the first is lost."""

    lost = 0

    def handle_request(self, request):
        response = super().handle_request(request)
        if request.url.path.endswith("completions") and not self.lost:
            self.lost += 1
            response.read()
            raise httpx2.ReadError("the connection broke", request=request)
        return response


def test_the_clients_own_retry_asks_once(client, model, served):
    session = client.post("/sessions", body={"request_id": "made"}, cast_to=object)["session_id"]
    assert client.post("/sessions", body={"request_id": "made"}, cast_to=object)["session_id"] == session
    twin = client.post(f"/sessions/{session}/fork", body={"request_id": "forked"}, cast_to=object)["session_id"]
    assert client.post(f"/sessions/{session}/fork", body={"request_id": "forked"}, cast_to=object)["session_id"] == twin
    asked = {"model": model, "messages": MESSAGES[1:], "max_tokens": 12, "temperature": 0}
    expected = said(client, **asked, extra_body={"session_id": twin})
    transport = Lossy()
    with httpx2.Client(transport=transport) as carrier:
        retrying = openai.OpenAI(base_url=f"{served.http}/v1", api_key="none", max_retries=2, http_client=carrier)
        assert said(retrying, **asked, extra_body={"session_id": session, "request_id": "once"}) == expected
    assert transport.lost == 1
    one, other = (client.get(f"/sessions/{name}", cast_to=object) for name in (session, twin))
    assert one["points"] == other["points"]


def test_a_broken_stream_is_given_again_from_its_beginning(client, model):
    session = client.post("/sessions", body={}, cast_to=object)["session_id"]
    twin = client.post(f"/sessions/{session}/fork", body={}, cast_to=object)["session_id"]
    asked = {"model": model, "messages": MESSAGES[1:], "max_tokens": 200, "temperature": 0, "stop": "\u00ff"}
    expected = streamed(client, **asked, extra_body={"session_id": twin})
    named = asked | {"extra_body": {"session_id": session, "request_id": "broken"}}
    broken = client.chat.completions.create(stream=True, **named)
    next(iter(broken))
    broken.close()
    assert streamed(client, **named) == expected


def test_a_named_answer_that_nobody_comes_back_for_is_ended(client, model):
    session = client.post("/sessions", body={}, cast_to=object)["session_id"]
    asked = {"model": model, "messages": MESSAGES[1:], "max_tokens": 3000, "stop": "\u00ff"}
    left = client.chat.completions.create(
        stream=True, extra_body={"session_id": session, "request_id": "left"}, **asked
    )
    next(iter(left))
    left.close()
    assert client.get(f"/sessions/{session}", cast_to=object)["answering"]
    client.post(f"/sessions/{session}/cancel", cast_to=httpx2.Response)
    assert not client.get(f"/sessions/{session}", cast_to=object)["answering"]


REFUSED = {
    "unknown option": {"frobnicate": 1},
    "unknown option of a message": {"messages": [{"role": "user", "content": "x", "weight": 1}]},
    "tools": {"tools": []},
    "several answers": {"n": 2},
    "a penalty": {"presence_penalty": 0.5},
    "JSON mode": {"response_format": {"type": "json_object"}},
    "an image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    "no message": {"messages": []},
    "no role": {"messages": [{"content": "x"}]},
    "the assistant last": {"messages": [{"role": "assistant", "content": "x"}]},
    "nothing said": {"messages": [{"role": "user", "content": ""}]},
    "only white space": {"messages": [{"role": "user", "content": " \n"}]},
    "NUL": {"messages": [{"role": "user", "content": "a\0b"}]},
    "negative temperature": {"temperature": -1},
    "temperature as text": {"temperature": "hot"},
    "no tokens": {"max_tokens": 0},
    "both limits": {"max_tokens": 4, "max_completion_tokens": 4},
    "too many log-probabilities": {"logprobs": True, "top_logprobs": 21},
    "top_logprobs alone": {"top_logprobs": 2},
    "usage without a stream": {"stream": False, "stream_options": {"include_usage": True}},
    "empty stop": {"stop": ""},
    "seventeen stops": {"stop": list("abcdefghijklmnopq")},
    "bad session": {"session_id": "no/slash"},
    "bad request id": {"request_id": "no/slash"},
    "no request id": {"request_id": ""},
    "too long": {"messages": [{"role": "user", "content": "x" * 4100}]},
    "far too long": {"messages": [{"role": "user", "content": "x" * 20_000}]},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused(client, model, case, stream):
    asked = {**CHAT, "model": model, "stream": stream} | REFUSED[case]
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=asked, cast_to=object)
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert caught.value.body["type"] == "invalid_request_error"
    assert "Traceback" not in caught.value.message


RAW = st.one_of(
    st.binary(max_size=200),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["model", "messages", "prompt", "stream", "role", "content", "stop", "seed", "x"]),
                inner,
            )
        ),
        max_leaves=12,
    ).map(lambda made: json.dumps(made).encode()),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=RAW, path=st.sampled_from(["chat/completions", "completions", "sessions", "sessions/s/documents/d/finish"]))
def test_malformed_bodies_are_the_callers_fault(served, body, path):
    connection = http.client.HTTPConnection("127.0.0.1", served.config.http_port, timeout=20)
    connection.request("POST", f"/v1/{path}", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    told = json.loads(response.read())
    connection.close()
    if path == "sessions" and response.status == 201:
        served.call(_deleted(served, told["session_id"]))
        return
    assert 400 <= response.status < 500, told
    assert set(told["error"]) == {"message", "type", "param", "code"}


async def _deleted(served, session_id):
    await served.gate.engines.call("delete", "", session_id)
