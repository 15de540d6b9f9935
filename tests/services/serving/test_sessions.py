"""Sessions as things to make, list, copy, take back, move and forget; each call carried out once."""

from __future__ import annotations

import asyncio

import pytest

from segcore.errors import (
    AlreadyExists,
    Busy,
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    SessionLost,
    WrongOffset,
)
from segcore.sampling import SamplingParams
from tests.services.serving.conftest import DOCUMENT, GREEDY, QUESTION, SAMPLED, ask, rest_of, upload


async def test_another_tenants_session_answers_as_one_that_is_absent(replica):
    sessions = replica()
    await sessions.create("ours", "s")
    calls = [
        lambda tenant, name: sessions.get(tenant, name),
        lambda tenant, name: sessions.delete(tenant, name),
        lambda tenant, name: sessions.fork(tenant, name, "new"),
        lambda tenant, name: sessions.rewind(tenant, name, 0),
        lambda tenant, name: anext(sessions.export(tenant, name)),
        lambda tenant, name: sessions.open_document(tenant, name, "d", None),
        lambda tenant, name: sessions.append(tenant, name, "d", 0, b"text"),
        lambda tenant, name: sessions.finish(tenant, name, "d", 4, b""),
        lambda tenant, name: sessions.get_document(tenant, name, "d"),
        lambda tenant, name: sessions.document_bytes(tenant, name, "d"),
        lambda tenant, name: anext(sessions.generate(tenant, name, "What?", GREEDY)),
        lambda tenant, name: sessions.cancel_answer(tenant, name),
    ]
    for call in calls:
        with pytest.raises(NotFound) as hidden:
            await call("theirs", "s")
        with pytest.raises(NotFound) as absent:
            await call("theirs", "t")
        assert hidden.value.message.replace("'s'", "'t'") == absent.value.message
    assert (await sessions.list_sessions("theirs")).sessions == []
    await sessions.create("theirs", "s")  # the name is free there
    assert (await sessions.get("ours", "s")).session_id == "s"


async def test_sessions_in_pages(replica):
    sessions = replica()
    for name in "dbac":
        await sessions.create("", name)
    first = await sessions.list_sessions("", 3)
    assert [info.session_id for info in first.sessions] == ["a", "b", "c"]
    rest = await sessions.list_sessions("", 3, first.next_page_token)
    assert ([info.session_id for info in rest.sessions], rest.next_page_token) == (["d"], "")


async def test_a_call_under_one_id_is_carried_out_once(replica):
    one, two = replica(), replica()
    made = await one.create("", "s", request_id="c")
    assert await two.create("", "s", request_id="c") == made
    for sessions in (one, two):
        await sessions.open_document("", "s", "d", None, request_id="o", expected_generation=made.generation)
    await upload(one)
    copy = await one.fork("", "s", "f", request_id="f")
    assert (await two.fork("", "s", "f", request_id="f")).create_time == copy.create_time
    point = (await one.get("", "s")).points[-1]
    await ask(one, request_id="g")
    back = await one.rewind("", "s", point, request_id="w")
    await ask(one, request_id="h")
    assert (await two.rewind("", "s", point, request_id="w")).generation > back.generation  # nothing is taken back
    data = b"".join([piece async for piece in one.export("", "s")])
    await one.import_session("", "i", data, request_id="i")
    await two.import_session("", "i", data, request_id="i")
    await one.delete("", "s", request_id="d")
    await two.delete("", "s", request_id="d")
    assert (await two.create("", "s", request_id="c")).session_id == "s"  # it was made, whatever came then
    with pytest.raises(NotFound):
        await two.get("", "s")
    for call in (
        lambda: two.create("", "s", request_id="c", ttl_s=5.0),
        lambda: two.create("", "f", request_id="f"),
        lambda: two.import_session("", "f", data, request_id="f"),
        lambda: two.delete("", "i", request_id="i"),
        lambda: two.rewind("", "f", 0, request_id="f"),
        lambda: two.open_document("", "f", "e", None, request_id="f"),
        lambda: ask(two, "f", request_id="f"),
    ):
        with pytest.raises(AlreadyExists):
            await call()
    with pytest.raises(NotFound):
        await two.delete("", "s", request_id="e")


async def test_another_question_under_an_answers_id(replica):
    sessions = replica()
    await sessions.create("", "s")
    await upload(sessions)
    await anext(sessions.generate("", "s", QUESTION, SAMPLED, request_id="r"))
    for params in (GREEDY, SamplingParams(max_tokens=1)):
        with pytest.raises(AlreadyExists, match="request_id 'r'"):
            await ask(sessions, params=params, request_id="r")
    with pytest.raises(FailedPrecondition, match="answering"):
        await ask(sessions, request_id="q")
    await ask(sessions, params=SAMPLED, request_id="r")
    with pytest.raises(AlreadyExists, match="request_id 'r'"):
        await ask(sessions, request_id="r")


async def test_a_write_at_another_generation_is_refused(replica):
    sessions = replica()
    generation = (await sessions.create("", "s")).generation
    await upload(sessions)
    for call in (
        lambda: sessions.open_document("", "s", "e", None, expected_generation=generation),
        lambda: ask(sessions, expected_generation=generation),
        lambda: sessions.fork("", "s", "f", expected_generation=generation),
        lambda: sessions.rewind("", "s", 0, expected_generation=generation),
        lambda: sessions.delete("", "s", expected_generation=generation),
    ):
        with pytest.raises(Conflict, match="has changed"):
            await call()
    now = (await sessions.get("", "s")).generation
    parts = [part async for part in sessions.generate("", "s", QUESTION, GREEDY, expected_generation=now)]
    assert parts[-1].generation == (await sessions.get("", "s")).generation > now
    await sessions.delete("", "s", expected_generation=parts[-1].generation)


async def test_a_fork_and_an_import_go_on_as_the_session_does(replica, undisturbed):
    one, two = replica(), replica(past_shared=None)
    await one.create("", "s")
    await upload(one)
    first = await ask(one)
    await one.fork("", "s", "f")
    data = b"".join([piece async for piece in one.export("", "s")])
    await two.import_session("", "i", data)
    texts = [await ask(one), await ask(one, "f"), await ask(two, "i")]
    assert [[first, text] for text in texts] == [await undisturbed(GREEDY)] * 3
    assert (await two.document_bytes("", "i", "d")) == DOCUMENT
    for spoilt in (data[:-1], b"", data[:60] + b"!" + data[61:]):
        with pytest.raises(InvalidRequest, match="exported"):
            await two.import_session("", "j", spoilt)


async def test_rewinding(replica, undisturbed):
    sessions = replica()
    await sessions.create("", "s")
    await upload(sessions)
    await ask(sessions, params=SAMPLED)
    await upload(sessions, document=DOCUMENT[:200], document_id="e")
    info = await sessions.get("", "s")
    assert len(info.points) == 3
    with pytest.raises(InvalidRequest, match="can go back to"):
        await sessions.rewind("", "s", info.points[0] + 1)
    back = await sessions.rewind("", "s", info.points[0])
    assert ([document.document_id for document in back.documents], back.points) == (["d"], info.points[:1])
    assert [await ask(sessions), await ask(sessions)] == await undisturbed(GREEDY)
    assert (await sessions.rewind("", "s", 0)).documents == []
    await upload(sessions)
    assert (await sessions.get("", "s")).points == info.points[:1]


async def test_time_to_live(replica):
    sessions = replica()
    await sessions.create("", "s", ttl_s=0.3)
    await sessions.open_document("", "s", "d", None)
    await asyncio.sleep(0.4)
    with pytest.raises(NotFound):
        await sessions.get("", "s")
    with pytest.raises(NotFound):
        await sessions.append("", "s", "d", 0, b"text")


async def test_far_more_sessions_than_the_engine_holds(replica, undisturbed):
    """Twenty at work on an engine for two: some are told to come back, none waits for ever, all are answered alike."""
    sessions = replica(max_sessions=2, slots=2)
    told = 0

    async def patiently(call):
        nonlocal told
        while True:
            try:
                return await call()
            except Busy as error:
                told += 1
                await asyncio.sleep(float(error.details["retry_after_s"]) / 10)

    async def run(name: str) -> list[str]:
        await sessions.create("", name)
        await sessions.open_document("", name, "d", None)
        for offset in range(0, len(DOCUMENT), 700):
            await patiently(lambda at=offset: sessions.append("", name, "d", at, DOCUMENT[at : at + 700]))
        await patiently(lambda: upload(sessions, name))
        return [await patiently(lambda: ask(sessions, name)) for _ in range(2)]

    expected = await undisturbed(GREEDY)
    assert await asyncio.wait_for(asyncio.gather(*(run(f"s{i}") for i in range(20))), 240) == [expected] * 20
    assert told


async def test_a_deadline_ends_an_answer_that_goes_on_later(replica, undisturbed):
    sessions = replica()
    await sessions.create("", "s")
    await upload(sessions)
    parts = sessions.generate("", "s", QUESTION, GREEDY, request_id="r", timeout_s=0.03)
    text, after, late = await rest_of(parts)
    assert isinstance(late, DeadlineExceeded)
    assert int(late.details["token_index"]) == after
    assert sessions._engine._scheduler.idle
    assert [text + await ask(sessions, request_id="r", after=after), await ask(sessions)] == await undisturbed(GREEDY)


async def test_a_deadline_ends_an_upload_that_goes_on_later(replica, undisturbed):
    """What was sent is kept, and the engine is free within one step."""
    sessions = replica()
    await sessions.create("", "s")
    await sessions.open_document("", "s", "d", None)
    with sessions._engine._changed:
        sessions._engine._interrupting += 1  # it stands still
    taken = await sessions.append("", "s", "d", 0, DOCUMENT[:900], timeout_s=0.05)
    assert taken.waiting
    assert taken.input_tokens > 100  # told before anybody waits, who may leave
    with pytest.raises(DeadlineExceeded) as late:
        await sessions.append("", "s", "d", 900, b"", timeout_s=0.05)
    assert late.value.details["committed_offset"] == "900"
    assert sessions._engine.stats().sessions == 0
    with sessions._engine._changed:
        sessions._engine._interrupting -= 1
        sessions._engine._changed.notify_all()
    with pytest.raises(WrongOffset):
        await sessions.append("", "s", "d", 0, DOCUMENT[:900])
    await upload(sessions)
    assert [await ask(sessions), await ask(sessions)] == await undisturbed(GREEDY)


async def test_an_answer_without_a_name_ends_with_its_stream(replica):
    sessions = replica()
    await sessions.create("", "s")
    await upload(sessions)
    parts = sessions.generate("", "s", QUESTION, SamplingParams(max_tokens=5000))
    await anext(parts)
    await parts.aclose()
    assert not (await sessions.get("", "s")).answering
    assert await ask(sessions)


async def test_a_reader_that_never_reads_holds_nobody_up(replica):
    sessions = replica()
    await sessions.create("", "s")
    await upload(sessions)
    parts = sessions.generate("", "s", QUESTION, GREEDY, request_id="r")
    await anext(parts)
    await asyncio.wait_for(sessions._lives.find(("", "s")).answer.task, 30)
    assert not (await sessions.get("", "s")).answering
    await sessions.create("", "t")
    await upload(sessions, "t")
    await parts.aclose()


async def test_sessions_of_another_configuration_are_refused_or_recomputed(replica, tmp_path):
    one = replica()
    await one.create("", "s")
    await upload(one)
    await ask(one)
    segment = one._config.segment | {"retrieved_tokens": 16}
    with pytest.raises(FailedPrecondition, match="another segment") as refused:
        await ask(replica(segment=segment))
    assert refused.value.details["fields"] == "segment"
    two = replica(segment=segment, changed_sessions="recompute")
    changed = await ask(two)
    alone = replica(segment=segment, sessions=str(tmp_path / "alone.sqlite"), past_shared=None)
    await alone.import_session("", "s", b"".join([piece async for piece in two.export("", "s")]))
    await alone.rewind("", "s", (await alone.get("", "s")).points[1])
    assert await ask(alone) == changed
    with pytest.raises(FailedPrecondition, match="another segment"):
        await ask(one)  # it is the other's now


async def test_a_damaged_log_is_told(replica):
    sessions, other = replica(), replica()
    await sessions.create("", "s")
    await upload(sessions)
    database = sessions._directory._db
    database.execute("UPDATE log SET entry = zeroblob(length(entry)) WHERE position = 2")
    with pytest.raises(SessionLost, match="damaged"):
        await ask(other)
    database.execute("DELETE FROM log WHERE position = 2")
    with pytest.raises(SessionLost):
        await ask(other)
    database.execute("UPDATE sessions SET record = x'00'")
    (info,) = (await other.list_sessions("")).sessions
    assert (info.session_id, "can't be read" in info.unreadable) == ("s", True)
    await other.delete("", "s")
    assert (await other.list_sessions("")).sessions == []


async def test_an_engines_failure_costs_no_session(replica, undisturbed, monkeypatch):
    sessions = replica()
    await sessions.create("", "s")
    await upload(sessions, document=DOCUMENT)
    policy = sessions._engine._runner.policy
    mark = sessions._engine._runner.mark

    def broken(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(sessions._engine._runner, "mark", broken)
    with pytest.raises(Exception, match="internal error"):
        await ask(sessions, request_id="r")
    monkeypatch.setattr(sessions._engine._runner, "mark", mark)
    assert policy is not None
    assert [await ask(sessions, request_id="r"), await ask(sessions)] == await undisturbed(GREEDY)
