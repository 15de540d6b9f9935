"""Sessions as one replica has them."""

from __future__ import annotations

import pytest

from segcore.errors import NotFound


async def test_another_tenants_session_answers_as_one_that_is_absent(replica):
    sessions = replica()
    await sessions.create("ours", "s", "")
    calls = [
        lambda tenant, name: sessions.get(tenant, name),
        lambda tenant, name: sessions.delete(tenant, name),
        lambda tenant, name: sessions.open_document(tenant, name, "d", None),
        lambda tenant, name: sessions.append(tenant, name, "d", 0, b"text"),
        lambda tenant, name: sessions.cancel_answer(tenant, name),
    ]
    for call in calls:
        with pytest.raises(NotFound) as hidden:
            await call("theirs", "s")
        with pytest.raises(NotFound) as absent:
            await call("theirs", "t")
        assert hidden.value.message.replace("'s'", "'t'") == absent.value.message
    await sessions.create("theirs", "s", "")  # the name is free there
    assert (await sessions.get("ours", "s")).session_id == "s"
