"""The engine tier from in front: replicas die at any moment, and calls come out as if none had."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from ray.exceptions import RayActorError

from segcore.errors import DeadlineExceeded, NotFound, SegcoreError
from services.serving import engines as engines_module
from services.serving.engines import Engines
from services.serving.session import Sessions
from tests.services.serving.conftest import DOCUMENT, GREEDY, QUESTION, SAMPLED
from tests.services.serving.test_takeover import killed


class Tier:
    """What a deployment handle does: calls go to a replica, which `fate` may kill before, in, or after the call."""

    def __init__(self, make: Callable[[], Sessions], fate: Callable[[], str]) -> None:
        self._make, self._fate = make, fate
        self.replica, self.kills = make(), 0
        self.silent = False

    def options(self, **_: object) -> Tier:
        return self

    def __getattr__(self, method: str) -> Any:
        return _Method(self, method)

    def die(self) -> None:
        killed(self.replica)
        self.replica, self.kills = self._make(), self.kills + 1
        raise RayActorError


class _Method:
    def __init__(self, tier: Tier, name: str) -> None:
        self._tier, self._name = tier, name

    def remote(self, *args: Any, **options: Any) -> Any:
        return self._stream(*args, **options) if self._name == "generate" else self._call(*args, **options)

    async def _call(self, *args: Any, **options: Any) -> Any:
        tier = self._tier
        fate = tier._fate()
        if fate == "before":
            tier.die()
        if fate == "silent" or tier.silent:
            tier.silent = True
            await asyncio.Event().wait()
        if self._name == "info":
            return None
        result = await getattr(tier.replica, self._name)(*args, **options)
        if fate == "after":
            tier.die()
        return result

    def _stream(self, *args: Any, **options: Any) -> Any:
        return _Parts(self._tier, args, options)


class _Parts:
    def __init__(self, tier: Tier, args: Any, options: Any) -> None:
        self._parts = self._run(tier, args, options)

    def __aiter__(self) -> AsyncGenerator[Any]:
        return self._parts

    def cancel(self) -> None:
        self._closing = asyncio.create_task(self._parts.aclose())

    async def _run(self, tier: Tier, args: Any, options: Any) -> AsyncGenerator[Any]:
        if tier._fate() == "before":
            tier.die()
        async with aclosing(tier.replica.generate(*args, **options)) as parts:
            async for part in parts:
                fate = tier._fate()
                if fate == "silent":
                    tier.silent = True
                    await asyncio.Event().wait()
                if fate != "well":
                    tier.die()
                yield part


class CutOff(Tier):
    """Two replicas: sessions belong to the first one; other places are the second one's.

    The first one may not be heard, until the second one is asked.
    """

    def __init__(self, make: Callable[[], Sessions], fate: Callable[[], str]) -> None:
        super().__init__(make, fate)
        self._second = Tier(make, lambda: "well")

    def options(self, session_id: str = "", **_: object) -> Tier:
        elsewhere = "/" in session_id
        self.silent = self.silent and not elsewhere
        return self._second if elsewhere else self


async def whole(engines: Engines) -> list[str]:
    made = await engines.call("create", "", "s")
    ack = await engines.call("open_document", "", "s", "d", None, expected_generation=made.generation)
    while ack.committed_offset < len(DOCUMENT):
        at = ack.committed_offset
        ack = await engines.append("", "s", "d", at, DOCUMENT[at : at + 199])
    await engines.finish("", "s", "d", len(DOCUMENT), hashlib.sha256(DOCUMENT).digest())
    texts = []
    for params in (SAMPLED, GREEDY):
        parts = engines.generate("", "s", QUESTION, params)
        texts.append("".join([part.text async for part in parts]))
    await engines.call("fork", "", "s", "f")
    await engines.call("delete", "", "s")
    return texts


@pytest.mark.parametrize("seed", [1, 2])
async def test_kills_at_random_moments(replica, config, seed, monkeypatch):
    monkeypatch.setattr(engines_module, "_LONGEST_WAIT_S", 0.01)
    expected = await whole(Engines(Tier(replica, lambda: "well"), config))
    chance = random.Random(seed)
    tier = Tier(replica, lambda: chance.choice(["before", "after", "well", "well", "well", "well"]))
    engines = Engines(tier, config)
    await engines.call("delete", "", "f")
    assert await whole(engines) == expected
    assert tier.kills >= 4
    with pytest.raises(NotFound):
        await engines.call("get", "", "s")


async def test_a_replica_that_says_nothing_is_gone_around(replica, config, monkeypatch):
    expected = await whole(Engines(Tier(replica, lambda: "well"), config))
    for name, seconds in {"_SILENCE_S": 0.3, "_ANSWERS_S": 0.1, "_LONGEST_WAIT_S": 0.01}.items():
        monkeypatch.setattr(engines_module, name, seconds)
    chance, silent = random.Random(1), []

    def fate() -> str:
        silent.append(chance.random() < 0.1)
        return "silent" if silent[-1] else "well"

    tier = CutOff(lambda: replica(lease_s=1), fate)
    engines = Engines(tier, config.model_copy(update={"slice_s": 0.3}))
    await engines.call("delete", "", "f")
    assert await whole(engines) == expected
    assert sum(silent) >= 2


async def test_noticing_that_a_replica_is_silent_takes_none_of_a_calls_patience(replica, config, monkeypatch):
    """With a lost node some 20 s pass before others are asked, as long as a call is tried on."""
    for name, seconds in {"_SILENCE_S": 0.5, "_ANSWERS_S": 0.1, "_PATIENCE_S": 0.1}.items():
        monkeypatch.setattr(engines_module, name, seconds)
    monkeypatch.setattr(Tier, "options", lambda self, **_: Tier(replica, lambda: "well") if self.silent else self)
    fates = iter(["silent"])
    engines = Engines(Tier(replica, lambda: next(fates, "well")), config.model_copy(update={"lease_s": 0.01}))
    assert (await engines.call("create", "", "quick")).session_id == "quick"


async def test_a_replica_that_works_for_long_is_waited_for(replica, config, monkeypatch):
    expected = await whole(Engines(Tier(replica, lambda: "well"), config))
    for name, seconds in {"_SILENCE_S": 0.0, "_PATIENCE_S": 0.0}.items():
        monkeypatch.setattr(engines_module, name, seconds)
    engines = Engines(CutOff(replica, lambda: "well"), config.model_copy(update={"slice_s": 0.001, "lease_s": 0.001}))
    await engines.call("delete", "", "f")
    assert await whole(engines) == expected


async def test_an_answer_that_its_reader_leaves_is_ended_unless_it_has_a_name(replica, config):
    tier = Tier(replica, lambda: "well")
    engines = Engines(tier, config)
    await whole(engines)
    for request_id in ("", "r"):
        parts = engines.generate("", "f", QUESTION, GREEDY, request_id=request_id)
        await anext(parts)
        await parts.aclose()
        if not request_id:  # one with a name may be whole by now
            assert not (await engines.call("get", "", "f")).answering
    left = [part async for part in engines.generate("", "f", QUESTION, GREEDY, request_id="r")]
    assert left[-1].answer_tokens == left[-1].token_index > 5


async def test_slices_and_deadlines_of_callers(replica, config):
    engines = Engines(Tier(replica, lambda: "well"), config.model_copy(update={"slice_s": 0.01}))
    expected = await whole(Engines(Tier(replica, lambda: "well"), config))
    await engines.call("delete", "", "f")
    assert await whole(engines) == expected
    with pytest.raises(DeadlineExceeded):
        _ = [part async for part in engines.generate("", "f", QUESTION, GREEDY, request_id="r", timeout_s=0.0)]
    assert [part async for part in engines.generate("", "f", QUESTION, GREEDY, request_id="r")]


async def test_a_tier_that_is_gone_for_good_is_said_to_be(replica, config, monkeypatch):
    monkeypatch.setattr(engines_module, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(engines_module, "_LONGEST_WAIT_S", 0.01)
    engines = Engines(Tier(replica, lambda: "well"), config.model_copy(update={"lease_s": 0.01}))

    def gone(*_: object, **__: object) -> None:
        raise RayActorError

    monkeypatch.setattr(_Method, "_call", gone)
    with pytest.raises(SegcoreError, match="isn't reachable"):
        await engines.call("get", "", "s")


async def test_a_tier_that_is_gone_takes_no_more_than_the_callers_time(replica, config, monkeypatch):
    """However long the tier would be waited for; a call that is made again has what is left of the time."""
    engines, told = Engines(Tier(replica, lambda: "well"), config), list[float]()

    def gone(method: _Method, *args: object, **options: object) -> None:
        inspect.signature(getattr(Sessions, method._name)).bind(None, *args, **options)
        told.append(options.get("timeout_s", ends - time.monotonic()))
        raise RayActorError

    monkeypatch.setattr(_Method, "_call", gone)
    monkeypatch.setattr(_Method, "_stream", gone)
    for call in (
        lambda ends: engines.call("open_document", "", "s", "d", None, ends=ends),
        lambda ends: anext(engines.generate("", "s", QUESTION, GREEDY, timeout_s=0.3)),
        lambda ends: engines.append("", "s", "d", 0, b"text", ends),
        lambda ends: engines.finish("", "s", "d", 4, b"", ends),
        lambda ends: anext(engines.generate("", "s", QUESTION, GREEDY, request_id="r", timeout_s=0.3)),
    ):
        ends = time.monotonic() + 0.3
        with pytest.raises(DeadlineExceeded):
            await call(ends)
        assert time.monotonic() < ends + 5
        assert told[0] > told[1]
        told.clear()
