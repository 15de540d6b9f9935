"""Sessions in whatever order they are opened, fed, asked, copied, moved, taken back and lost.

Every answer is held against the same stream on an engine of its own: fp64, greedy, token for token.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from segcore.config import CacheConfig, SegmentConfig
from segcore.model import CausalLM
from tests.conftest import tiny_model, tiny_segment
from tests.segcore.engine.loop import BLOCK_BYTES
from tests.segcore.engines import SECONDS, STREAM, answer, at_rest, engine_of


class Sessions(RuleBasedStateMachine):
    """Anything a caller may do, in any order: at each answer, the tokens are those of a fresh engine that is fed the
    same stream at once. Budgets are small, slots few, and blocks get lost."""

    segment: SegmentConfig = tiny_segment()
    lm = None

    def __init__(self) -> None:
        super().__init__()
        Sessions.lm = Sessions.lm or CausalLM(tiny_model())
        self.engine = engine_of(Sessions.lm, slots=2, slot_steps=2, cache=CacheConfig(host_bytes=200 * BLOCK_BYTES))
        self.streams: dict[str, list[int]] = {}
        self.marks: dict[str, set[int]] = {}
        self.count = 0

    def teardown(self) -> None:
        self.engine.check_integrity()
        self.engine.shutdown()

    def pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.streams)))

    @precondition(lambda self: len(self.streams) < 4)
    @rule()
    def open(self) -> None:
        self.count += 1
        self.engine.open(f"s{self.count}")
        self.streams[f"s{self.count}"], self.marks[f"s{self.count}"] = [], set()

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), first=st.integers(0, 3), count=st.integers(1, 40))
    def append(self, data: st.DataObject, first: int, count: int) -> None:
        name = self.pick(data)
        self.engine.append(name, STREAM[first : first + count])
        self.streams[name] += STREAM[first : first + count]

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def mark(self, data: st.DataObject) -> None:
        name = self.pick(data)
        self.engine.mark(name)
        self.marks[name].add(len(self.streams[name]))

    @precondition(lambda self: 0 < len(self.streams) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        name, self.count = self.pick(data), self.count + 1
        self.engine.fork(name, f"s{self.count}")
        self.streams[f"s{self.count}"] = list(self.streams[name])
        self.marks[f"s{self.count}"] = set(self.marks[name])

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        name = self.pick(data)
        self.engine.flush(name).result(SECONDS)
        segments = data.draw(st.integers(0, len(self.streams[name]) // 16))
        self.engine.rewind(name, 16 * segments)
        del self.streams[name][16 * segments :]
        self.marks[name] = {m for m in self.marks[name] if m < 16 * segments}

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        name = self.pick(data)
        snapshot = self.engine.snapshot(name)
        self.engine.close(name)
        self.engine.restore(name, snapshot)

    @rule()
    def lose_blocks(self) -> None:
        """Every block is gone from memory, and there is nowhere else to look."""
        with at_rest(self.engine):
            for key in self.engine._past._host.keys:
                self.engine._past._host.delete(key)

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        name = self.pick(data)
        self.engine.close(name)
        del self.streams[name], self.marks[name]

    @precondition(lambda self: any(self.streams.values()))
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, stream in self.streams.items() if stream)))
        tokens = answer(self.engine, name, 3)
        assert tokens == self.expected(name)
        self.streams[name] += tokens

    def expected(self, name: str) -> list[int]:
        assert Sessions.lm is not None
        engine, stream = engine_of(Sessions.lm), self.streams[name]
        engine.open("s")
        cuts = sorted({0, len(stream), *self.marks[name]})
        for start, stop in zip([*cuts[:-1]], cuts[1:], strict=True):
            if start in self.marks[name]:
                engine.mark("s")
            engine.append("s", stream[start:stop])
        if len(stream) in self.marks[name]:
            engine.mark("s")
        tokens = answer(engine, "s", 3)
        engine.shutdown()
        return tokens

    @invariant()
    def nothing_failed(self) -> None:
        assert all(session.failure is None for session in self.engine._sessions.values())


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
