"""10,000 malformed requests, over a real channel: each is refused with a status that says whose fault it is.

Half of them are messages of the right kind with absurd fields, made by hypothesis from the descriptors; half are bytes,
of which nothing knows the grammar: noise, and messages that are cut, flipped and glued together.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import random
from collections import Counter
from contextlib import suppress

import grpc
import psutil
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from protos.gen.segcore.v1 import segcore_pb2 as pb
from services.serving.client import AsyncClient

pytestmark = pytest.mark.slow

METHODS = [method for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods]
REQUESTS = 10_000
AT_A_TIME, AT_ONCE = 500, 20
# Ours, or nobody's: what no request may be answered with.
FAULTS = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.DATA_LOSS,
}
# What gRPC's client says by itself if a stream ends while it still writes.
WROTE_ON = "Internal error from Core"
# How a call ends that asks for no time at all.
NO_TIME = "the time of 0.0 s is up"
MOST_GROWTH_BYTES = 48 * 2**20
REAL = "real"
Call = tuple[MethodDescriptor, list[bytes]]

NAMES = st.sampled_from([REAL, "", "absent", "no/slash", "x" * 65, "../../etc/passwd", "\u0000", "é"])
NUMBERS = st.sampled_from([0, 1, 3, -1, -5, 2**31 - 1, -(2**31)])
LARGE = NUMBERS | st.sampled_from([2**63 - 1, -(2**63)])
KINDS: dict[int, st.SearchStrategy[object]] = {
    FieldDescriptor.TYPE_STRING: NAMES | st.text(max_size=8),
    FieldDescriptor.TYPE_BYTES: st.sampled_from([b"", b"text", b"\xff\xfe", bytes(64), b"x" * 5000]),
    FieldDescriptor.TYPE_INT32: NUMBERS,
    FieldDescriptor.TYPE_INT64: LARGE,
    FieldDescriptor.TYPE_DOUBLE: st.sampled_from([0.0, 1.0, -1.0, 1e308, float("nan"), float("inf")]),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
}


@st.composite
def messages(draw: st.DrawFn, kind: Descriptor) -> Message:
    """A message any of whose fields may be set, to anything. Answers are short, so that they end."""
    made = GetMessageClass(kind)()
    for field in kind.fields:
        if not draw(st.booleans()):
            continue
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(made, field.name).CopyFrom(draw(messages(field.message_type)))
        elif field.is_repeated:
            getattr(made, field.name).extend(draw(st.lists(KINDS[field.type], max_size=3)))
        else:
            setattr(made, field.name, draw(KINDS[field.type]))
    if kind.name == "GenerateRequest":
        made.sampling.max_tokens = min(made.sampling.max_tokens, 3)
    return made


@st.composite
def calls(draw: st.DrawFn) -> Call:
    method = draw(st.sampled_from(METHODS))
    sent = draw(st.lists(messages(method.input_type), min_size=1, max_size=4 if method.client_streaming else 1))
    return method, [message.SerializeToString() for message in sent]


def noise(chance: random.Random, known: list[bytes]) -> Call:
    """Bytes of any kind, or what became of good ones."""
    data = bytearray(chance.choice(known) if chance.random() < 0.7 else chance.randbytes(chance.randint(0, 60)))
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, len(data))
        what = chance.randint(0, 3)
        if what == 0:
            del data[at:]
        elif what == 1:
            data[at:at] = chance.randbytes(chance.randint(1, 8))
        elif what == 2:
            data += chance.choice(known)
        elif at < len(data):
            data[at] ^= 1 << chance.randint(0, 7)
    return chance.choice(METHODS), [bytes(data)]


@dataclasses.dataclass
class Outcome:
    """What calls ended with, and what should never be."""

    codes: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: list[str] = dataclasses.field(default_factory=list)

    async def send(self, address: str, wanted: list[Call]) -> None:
        room = asyncio.Semaphore(AT_ONCE)

        async def one(method: MethodDescriptor, sent: list[bytes]) -> None:
            path = f"/{method.containing_service.full_name}/{method.name}"
            async with room:
                call = channel.stream_stream(path)(iter(sent), timeout=60)
                code, details = await ended(call)
            self.codes[code.name] += 1
            theirs = details == WROTE_ON or details.startswith(NO_TIME)
            if (code in FAULTS and not theirs) or "Traceback" in details:
                self.faults.append(f"{method.name} {sent}: {code.name} {details}")

        async with grpc.aio.insecure_channel(address) as channel:
            await asyncio.gather(*(one(*call) for call in wanted))


async def ended(call: grpc.aio.StreamStreamCall) -> tuple[grpc.StatusCode, str]:
    """A call's status and its details, which come behind all its messages."""
    with suppress(grpc.RpcError):
        async for _ in call:
            pass
    return await call.code(), await call.details() or ""


async def clean_up(engine) -> int:
    """Delete all sessions; how many there were."""
    names = [info.session_id for info in (await engine.list_sessions("", 1000)).sessions]
    for name in names:
        await engine.delete("", name)
    return len(names)


def resident_bytes() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def absurd_calls(count: int) -> list[Call]:
    """What hypothesis comes up with."""
    made: list[Call] = []

    @settings(max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(calls())
    def collect(call: Call) -> None:
        made.append(call)

    collect()
    return made


def test_ten_thousand_malformed_requests(front, loop, engine, tell):
    served, chance, outcome, memory = front(), random.Random(7), Outcome(), list[int]()
    wanted = absurd_calls(REQUESTS // 2)
    known = [data for _, sent in wanted for data in sent]
    wanted += [noise(chance, known) for _ in range(REQUESTS - len(wanted))]
    chance.shuffle(wanted)
    loop.call(engine.create("", REAL))
    for first in range(0, len(wanted), AT_A_TIME):
        asyncio.run(outcome.send(served.grpc, wanted[first : first + AT_A_TIME]))
        memory.append(resident_bytes())
    made, growth = loop.call(clean_up(engine)), memory[-1] - memory[len(memory) // 4]
    told = f"{len(outcome.faults)} of them as faults of ours; {made} sessions made; {growth / 2**20:+.0f} MiB"
    tell(f"{outcome.codes.total()} malformed requests, answered {dict(outcome.codes)}, {told}")
    assert outcome.faults[:5] == []
    assert outcome.codes.total() == REQUESTS
    assert growth < MOST_GROWTH_BYTES
    # Nothing is left of them, in the engine or beside it.
    engine._engine.check_integrity()
    assert engine._engine.stats().sessions == 0
    assert not engine._sessions._lives._lives


async def test_bytes_that_are_no_message_are_the_callers_fault(front):
    served = front()
    async with grpc.aio.insecure_channel(served.grpc) as channel:
        for method in METHODS:
            path = f"/{method.containing_service.full_name}/{method.name}"
            code, _ = await ended(channel.stream_stream(path)(iter([b"\xff\xff\xff"]), timeout=20))
            assert code is grpc.StatusCode.INVALID_ARGUMENT, path
    async with AsyncClient(served.grpc) as client:
        assert (await client.server_info()).policy == "segmented"
