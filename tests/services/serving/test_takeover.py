"""Any replica continues any session: two replicas, one directory, and nobody can tell from the text."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import aclosing

import pytest

from segcore.errors import FailedPrecondition, LeaseLost, NotFound, SegcoreError, Unavailable
from services.serving.session import Sessions
from tests.services.serving.conftest import DOCUMENT, GREEDY, QUESTION, SAMPLED, ask, rest_of, upload


class Gone:
    """A directory that can't be reached."""

    def __getattr__(self, name: str) -> object:
        raise Unavailable("gone")


def killed(sessions: Sessions) -> None:
    """As if its process had gone: nothing of it is written any more, and its leases end."""
    lives = sessions._lives
    for live in lives._lives.values():
        if live.lease is not None:
            lives.directory.release(live.lease)
    lives.directory = Gone()  # type: ignore[assignment]


async def test_every_message_to_the_other_replica(replica, undisturbed):
    replicas = [replica(), replica()]
    await replicas[0].create("", "s")
    await replicas[1].open_document("", "s", "d", None)
    for i, offset in enumerate(range(0, len(DOCUMENT), 301)):
        await replicas[i % 2].append("", "s", "d", offset, DOCUMENT[offset : offset + 301])
    await replicas[0].finish("", "s", "d", len(DOCUMENT), hashlib.sha256(DOCUMENT).digest())
    texts = [await ask(replicas[1]), await ask(replicas[0])]
    assert texts == await undisturbed(GREEDY)
    assert len(set(texts[0])) > 5


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_an_answer_goes_on_elsewhere_after_every_token(replica, undisturbed, params):
    """A replica is killed after each token that the client got: none is repeated, none lacks."""
    one = replica()
    await one.create("", "s")
    await upload(one)
    killed(one)
    texts, after = [""], 0
    for _ in range(4):
        sessions = replica()
        parts = sessions.generate("", "s", QUESTION, params, request_id="r", after=after)
        async with aclosing(parts):
            part = await anext(parts)
            texts[0] += part.text
            assert part.token_index > after
            after = part.token_index
            killed(sessions)
    last = replica()
    texts[0] += await ask(last, params=params, request_id="r", after=after)
    texts.append(await ask(last, params=params))
    assert texts == await undisturbed(params)


async def test_an_answer_that_has_ended_is_given_again(replica):
    one, two = replica(), replica()
    await one.create("", "s")
    await upload(one)
    parts = [part async for part in one.generate("", "s", QUESTION, SAMPLED, request_id="r")]
    whole = "".join(part.text for part in parts)
    again = [part async for part in two.generate("", "s", QUESTION, SAMPLED, request_id="r")]
    assert "".join(part.text for part in again) == whole
    assert (again[-1].finish_reason, again[-1].answer_tokens) == (parts[-1].finish_reason, parts[-1].answer_tokens)
    for i, part in enumerate(parts):
        rest = await ask(two, params=SAMPLED, request_id="r", after=part.token_index)
        if part.finish_reason is None:
            assert rest == "".join(part.text for part in parts[i + 1 :])
    tokens = (await one.get("", "s")).points[-1]
    assert (await two.get("", "s")).points == [*(await one.get("", "s")).points[:-1], tokens]
    with pytest.raises(FailedPrecondition, match="said to be known"):
        await ask(two, params=SAMPLED, request_id="r", after=99)


async def test_a_killed_replica_in_an_upload(replica, undisturbed):
    one = replica()
    await one.create("", "s")
    await one.open_document("", "s", "d", None)
    await one.append("", "s", "d", 0, DOCUMENT[:1000])
    killed(one)
    two = replica()
    assert (await two.get_document("", "s", "d")).committed_offset == 1000
    assert (await two.open_document("", "s", "d", None)).committed_offset == 1000
    await upload(two)
    assert [await ask(two), await ask(two)] == await undisturbed(GREEDY)


async def test_the_second_replica_takes_over_past_kv(replica):
    one, two = replica(), replica()
    await one.create("", "s")
    await upload(one)
    one._engine._past.settle()
    await ask(two)
    assert two._engine._sessions["/s"].past.segments >= 17
    journal = two._engine._sessions["/s"].past.journal
    assert len(journal.tokens) > 17 * 64
    assert two._engine.stats().past_bytes["disk"] < one._engine.stats().past_bytes["disk"] / 4


async def test_one_replica_at_a_time_while_a_call_lasts(replica):
    """The second one is told to try again, and the first one lets go at its next renewal."""
    one, two = replica(lease_s=0.3), replica(lease_s=0.3)
    await one.create("", "s")
    await upload(one)
    params = GREEDY.__class__(max_tokens=3000)
    parts = one.generate("", "s", QUESTION, params, request_id="r")
    first = await anext(parts)
    with pytest.raises(Unavailable) as refused:
        await two.append("", "s", "e", 0, b"text")
    assert float(refused.value.details["retry_after_s"]) <= 0.3
    _, index, told = await rest_of(parts)
    assert isinstance(told, Unavailable)
    assert "another replica" in told.message
    index = max(index, first.token_index)  # none comes any more, where the machine is slow
    assert int(told.details["token_index"]) == index
    with pytest.raises(FailedPrecondition, match="answering"):
        await two.open_document("", "s", "e", None)
    await two.cancel_answer("", "s")
    await two.open_document("", "s", "e", None)
    assert (await two.get("", "s")).processed_tokens >= index


async def test_a_replica_that_lost_its_lease_writes_nothing(replica, undisturbed):
    """It slept through its end, another went on: what it made meanwhile is dropped, and it goes on as the other."""
    one, two = replica(), replica()
    await one.create("", "s")
    await upload(one)
    parts = one.generate("", "s", QUESTION, GREEDY, request_id="r")
    got = await anext(parts)
    live = one._lives.find(("", "s"))
    one._directory.release(live.lease)  # as if its time had been up
    whole = got.text + await ask(two, request_id="r", after=got.token_index)
    text, _, error = await rest_of(parts)
    assert isinstance(error, LeaseLost)
    assert whole.startswith(got.text + text)
    assert [whole, await ask(one)] == await undisturbed(GREEDY)


async def test_a_caller_who_is_back_takes_over_its_stream(replica, undisturbed):
    one = replica()
    await one.create("", "s")
    await upload(one)
    left = one.generate("", "s", QUESTION, GREEDY, request_id="r")
    first = await anext(left)
    rest = await ask(one, request_id="r", after=first.token_index)
    assert [first.text + rest, await ask(one)] == await undisturbed(GREEDY)
    with pytest.raises(Unavailable):
        async for _ in left:
            pass


async def test_slices_and_pauses_change_nothing(replica, undisturbed):
    one = replica()
    await one.create("", "s")
    await upload(one)
    text, after, slices, reason = "", 0, 0, None
    while reason is None:
        async for part in one.generate("", "s", QUESTION, SAMPLED, request_id="r", after=after, slice_s=0.02):
            text, after, reason = text + part.text, part.token_index, part.finish_reason
        slices += 1
    assert slices > 1
    assert [text, await ask(one, params=SAMPLED)] == await undisturbed(SAMPLED)


async def test_a_deleted_session_ends_everywhere(replica):
    one, two = replica(lease_s=0.3), replica()
    await one.create("", "s")
    await upload(one)
    parts = one.generate("", "s", QUESTION, GREEDY.__class__(max_tokens=5000), request_id="r")
    await anext(parts)
    await two.delete("", "s")
    with pytest.raises(SegcoreError):
        async for _ in parts:
            pass
    for sessions in (one, two):
        with pytest.raises(NotFound):
            await sessions.get("", "s")
        with pytest.raises(NotFound):
            await ask(sessions)
    await one.create("", "s")
    assert (await two.get("", "s")).documents == []


async def test_drain_ends_calls_and_another_goes_on(replica, undisturbed):
    one, two = replica(), replica()
    await one.create("", "s")
    await upload(one)
    parts = one.generate("", "s", QUESTION, GREEDY, request_id="r")
    got = await anext(parts)
    draining = asyncio.create_task(one.drain())
    text, index, error = await rest_of(parts)
    assert isinstance(error, Unavailable)
    await draining
    with pytest.raises(Unavailable, match="going away"):
        await one.append("", "s", "d", 0, b"")
    text = got.text + text + await ask(two, request_id="r", after=index or got.token_index)
    assert [text, await ask(two)] == await undisturbed(GREEDY)


async def test_the_passes_are_those_of_an_undisturbed_session(replica, tmp_path):
    """So the last bits are, too."""

    async def events(kills: int) -> list[int]:
        where = {"sessions": str(tmp_path / f"{kills}.sqlite"), "past_shared": None}
        sessions = replica(**where)
        await sessions.create("", "s")
        await upload(sessions)
        for _ in range(kills):
            async with aclosing(sessions.generate("", "s", QUESTION, SAMPLED, request_id="r")) as parts:
                await anext(parts)
                killed(sessions)
            sessions = replica(**where)
        await ask(sessions, params=SAMPLED, request_id="r")
        await ask(sessions, params=SAMPLED)
        found: list[int] = sessions._engine._sessions["/s"].past.journal.events.tolist()
        return found

    assert await events(0) == await events(3)
