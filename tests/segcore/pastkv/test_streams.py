"""Anything that streams may do, in any order and on many threads: the books balance."""

from __future__ import annotations

import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from segcore.config import CacheConfig
from segcore.errors import BlockMissing, StorageFull
from segcore.pastkv.manager import PastKVManager
from tests.segcore.blocks import (
    BLOCK_BYTES,
    FILE_BYTES,
    LAYOUT,
    TOKENS,
    boundary,
    close_segment,
    everything,
    gathers,
    same,
    same_tensors,
)


def test_many_threads_keep_the_books(make_past, tmp_path):
    """Streams that share blocks, each on a thread of its own, in little memory."""
    past = make_past(blocks=9, directory=tmp_path, disk_bytes=40 * FILE_BYTES)
    wrong: list[object] = []

    def live(own: int) -> None:
        try:
            for round_ in range(6):
                seeds = (0, 1, 100 + own * 10 + round_, 2)
                stream = past.open_stream(LAYOUT)
                for seed in seeds:
                    close_segment(stream, seed)
                    stream.prefetch(torch.arange(0, stream.segments * TOKENS, 3))
                if not gathers(stream, *seeds):
                    wrong.append(seeds)
                fork = stream.fork()
                stream.truncate(1)
                if not gathers(fork, *seeds):
                    wrong.append(seeds)
                fork.truncate(0)
                stream.truncate(0)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=live, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not [w for w in wrong if not isinstance(w, BlockMissing)], wrong


class Streams(RuleBasedStateMachine):
    """Streams open, grow, fork and end in little memory above a small disk, beside lists of what they hold."""

    which, seeds = st.integers(0, 2), st.integers(0, 3)

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.past = PastKVManager(
            CacheConfig(host_bytes=int(4.2 * BLOCK_BYTES), directory=Path(self.folder.name), disk_bytes=5 * FILE_BYTES)
        )
        self.streams = {i: self.past.open_stream(LAYOUT) for i in range(3)}
        self.model: dict[int, tuple[int, ...]] = dict.fromkeys(range(3), ())

    def teardown(self) -> None:
        for stream in self.streams.values():
            stream.truncate(0)
        self.past.check_integrity()
        self.past.close()
        self.folder.cleanup()

    @rule(i=which, seed=seeds)
    def append(self, i: int, seed: int) -> None:
        stream = self.streams[i]
        try:
            close_segment(stream, seed)
            self.model[i] += (seed,)
        except StorageFull:  # only when there is more than both tiers take
            assert len(set().union(*map(self.prefixes, self.model.values()))) >= 4
            stream.truncate(len(self.model[i]))
            stream.journal.truncate(stream.segments * TOKENS)

    @staticmethod
    def prefixes(seeds: tuple[int, ...]) -> set[tuple[int, ...]]:
        return {seeds[: n + 1] for n in range(len(seeds))}

    @rule(i=which, seed=seeds)
    def abandon(self, i: int, seed: int) -> None:
        """A segment closes, but the state after it isn't reached."""
        stream, before = self.streams[i], len(self.model[i])
        with suppress(StorageFull):
            close_segment(stream, seed, complete=False)
        stream.truncate(before)
        stream.journal.truncate(before * TOKENS)

    @rule(i=which, j=which)
    def fork(self, i: int, j: int) -> None:
        self.streams[j].truncate(0)
        if i == j:
            self.streams[j], self.model[j] = self.past.open_stream(LAYOUT), ()
        else:
            self.streams[j], self.model[j] = self.streams[i].fork(), self.model[i]

    @rule(i=which, data=st.data())
    def truncate(self, i: int, data: st.DataObject) -> None:
        segments = data.draw(st.integers(0, len(self.model[i])))
        self.streams[i].truncate(segments)
        self.streams[i].journal.truncate(segments * TOKENS)
        self.model[i] = self.model[i][:segments]

    @rule(i=which, data=st.data())
    def read(self, i: int, data: st.DataObject) -> None:
        if self.model[i]:
            last = len(self.model[i]) * TOKENS - 1
            chosen = data.draw(st.lists(st.integers(0, last), unique=True, max_size=12).map(sorted))
            if data.draw(st.booleans()):
                self.streams[i].prefetch(torch.tensor(chosen, dtype=torch.long))
            got = self.streams[i].gather(torch.tensor(chosen, dtype=torch.long))
            assert same(got, everything(*self.model[i])[chosen])

    @rule(i=which)
    def adopt(self, i: int) -> None:
        """A new stream begins as stream i did, as far as it is there: all of it is in use, so all of it is."""
        again = self.past.open_stream(LAYOUT)
        for n, key in enumerate(self.streams[i].keys):
            assert again.restore_seconds(key) is not None
            assert same_tensors(again.adopt(key), boundary(self.model[i][n]))
        again.truncate(0)

    @invariant()
    def the_books_balance(self) -> None:
        self.past.check_integrity()
        assert self.past.host_bytes <= 4.2 * BLOCK_BYTES
        uses: dict[str, int] = {}
        for stream in self.streams.values():
            for key in stream.keys:
                uses[key] = uses.get(key, 0) + 1
            assert stream.intact() == stream.segments
        assert self.past.keys_in_use == uses


Streams.TestCase.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
test_streams_equal_lists = Streams.TestCase
