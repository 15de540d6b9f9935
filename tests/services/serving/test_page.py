"""The page, as a person uses it, in a headless Chromium."""

from __future__ import annotations

import json

import pytest

from services.serving.tenants import token_hash
from tests.chromium import PROGRAM, chromium

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason="no Chromium")]

# Of several segments, with characters of several bytes, so that places in bytes and in characters differ.
DOCUMENT = "".join(f"Entry {i}: the café at № {i * 7919 % 10007}.\n" for i in range(60))
ASKED = "document.querySelectorAll('#turns .facts button').length === {}"


async def ask(tab, question, number):
    await tab.js(f"at('question').value = {json.dumps(question)}; at('ask').requestSubmit()")
    await tab.until(ASKED.format(number))


@pytest.fixture
def document(tmp_path):
    file = tmp_path / "document.txt"
    file.write_text(DOCUMENT)
    return file


async def test_a_document_is_read_asked_about_and_forked(front, document):
    served = front()
    async with chromium() as tab:
        await tab.open(served.http)
        await tab.until("!at('send').disabled")
        await tab.choose_file("#file", document)
        await tab.until("current.documents[0]?.finished === true")
        assert await tab.js("at('text').textContent") == DOCUMENT
        assert int((await tab.js("at('tokens').textContent")).replace(",", "")) > 1000
        assert int(await tab.js("at('segments').textContent")) >= 15
        assert await tab.js("at('engine').textContent") != "–"
        assert (await tab.js("at('line-past').getAttribute('d')")).count("L") >= 2

        # What is marked is what the engine retrieved, in the very text; late in an answer that may be of the answer.
        passages, turns = [], 0
        while not passages and turns < 8:
            turns += 1
            await ask(tab, "Which café?" + " Which one?" * turns, turns)
            assert (await tab.js("[...document.querySelectorAll('#turns .answer')].at(-1).textContent")).strip()
            passages = (await tab.js("current.turns.at(-1).passages")) or []
        assert sum(passage["tokens"] for passage in passages) > 0
        marked = await tab.js("[...document.querySelectorAll('#text mark')].map((mark) => mark.textContent)")
        data = DOCUMENT.encode()
        said = [data[p["start_byte"] : p["end_byte"]].decode(errors="replace") for p in passages]
        assert marked == said
        assert await tab.js("at('text').textContent") == DOCUMENT
        assert await tab.js("document.querySelectorAll('#map rect').length") == len(passages)

        await tab.js("at('fork').click()")
        await tab.until("sessions.length === 2 && current === sessions[1]")
        await ask(tab, "And which number?", turns + 1)
        assert await tab.js("sessions.map((session) => session.turns.length)") == [turns, turns + 1]
        await tab.js("show(sessions[0])")
        assert await tab.js("document.querySelectorAll('#turns li').length") == turns
        await ask(tab, "And which number?", turns + 1)  # the first session stands where it stood
        answers = "sessions.map((session) => session.turns.at(-1).item.querySelector('.answer').textContent)"
        first, second = await tab.js(answers)
        assert first == second
        assert tab.complaints == []


async def test_a_dropped_file_is_uploaded(front, engine, document):
    served = front()
    async with chromium() as tab:
        await tab.open(served.http)
        await tab.until("!at('send').disabled")
        await tab.drop_file("#drop", document)
        await tab.until("current.documents[0]?.finished === true")
        assert await tab.js("at('text').textContent") == DOCUMENT
        assert await tab.js("!at('drop').classList.contains('over') && at('notice').hidden")
        kept = served.call(engine._sessions.document_bytes("", await tab.js("current.id"), "d1"))
        assert kept == DOCUMENT.encode()
        assert tab.complaints == []


async def test_what_is_wrong_is_said_and_the_session_goes_on(front, tmp_path, document):
    served, binary = front(), tmp_path / "image.png"
    binary.write_bytes(b"The first pieces are text. " * 60 + b"PNG\0\0")
    async with chromium() as tab:
        await tab.open(served.http)
        await tab.until("!at('send').disabled")
        await tab.choose_file("#file", binary)
        await tab.until("!at('notice').hidden")
        assert "binary file" in await tab.js("at('notice').textContent")
        await tab.choose_file("#file", document)
        await tab.until("current.documents[1]?.finished === true")
        assert await tab.js("at('notice').hidden")


async def test_a_token_is_asked_for_and_kept_for_the_tab(front, tmp_path):
    file = tmp_path / "tenants.json"
    file.write_text(json.dumps({"tenants": [{"name": "x", "tokens": [token_hash("secret")]}]}))
    served = front(tenants=file)
    async with chromium() as tab:
        await tab.open(served.http)
        await tab.until("!at('token').hidden")
        assert await tab.js("current === null && at('send').disabled")
        await tab.js("at('token').value = 'secret'; at('token').dispatchEvent(new Event('change'))")
        await tab.until("!at('send').disabled && at('token').hidden")


async def test_an_upload_waits_for_the_limit_and_goes_on(front, engine, tmp_path, document):
    tenants = tmp_path / "tenants.json"
    tenant = {"name": "x", "tokens": [token_hash("secret")], "bytes_per_minute": 30_000}
    tenants.write_text(json.dumps({"tenants": [tenant]}))
    served = front(tenants=tenants)
    async with chromium() as tab:
        await tab.open(served.http)
        await tab.until("!at('token').hidden")
        await tab.js("at('token').value = 'secret'; at('token').dispatchEvent(new Event('change'))")
        await tab.until("!at('send').disabled")
        served.gate._quotas.charge(served.gate._tenants.authenticate("Bearer secret"), "bytes", 30_000)
        await tab.choose_file("#file", document)
        await tab.until("current.documents[0]?.finished === true")
        kept = served.call(engine._sessions.document_bytes("x", await tab.js("current.id"), "d1"))
        assert kept == DOCUMENT.encode()
        assert any("429" in complaint for complaint in tab.complaints)


async def test_nothing_comes_from_elsewhere(front):
    served = front()
    async with chromium() as tab:
        await tab.open(served.http)
        await tab.until("!at('send').disabled")
        loaded = await tab.js("performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert loaded
        assert all(name.startswith(served.http) for name in loaded)
        with pytest.raises(AssertionError):  # and the browser sees to it
            await tab.js("fetch('https://example.com')")
