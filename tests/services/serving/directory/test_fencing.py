"""No write under a lost lease ever lands: replicas that claim, sleep, write, delete and begin anew in any order."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from segcore.errors import AlreadyExists, LeaseLost, NotFound, Unavailable
from services.serving.directory import open_directory
from services.serving.directory.base import Directory, Lease, Name

NAMES = [Name("", "a"), Name("t", "a")]
OWNERS = ["x", "y", "z"]
names, owners = st.sampled_from(NAMES), st.sampled_from(OWNERS)


class Fencing(RuleBasedStateMachine):
    """Beside the directory, what it must hold, and whose lease is the last one of each name."""

    directory: Directory

    def __init__(self) -> None:
        super().__init__()
        self.logs: dict[Name, list[bytes]] = {}
        self.generations: dict[Name, int] = {}
        self.holders: dict[Name, tuple[str, float] | None] = {}
        self.leases: list[tuple[Lease, int]] = []  # as their owners know them, with a generation
        self.valid: dict[Name, Lease | None] = {}
        self.written = 0

    @initialize()
    def clean(self) -> None:
        for name in NAMES:
            stored = self.directory.read(name)
            if stored is not None and not stored.deleted:
                self.directory.delete(name, b"", 1000)

    @rule(name=names)
    def create(self, name: Name) -> None:
        try:
            self.directory.create(name, b"")
            assert name not in self.logs
            self.logs[name], self.generations[name] = [], 1
            self.valid[name] = self.holders[name] = None
        except AlreadyExists:
            assert name in self.logs

    @rule(name=names, owner=owners, seconds=st.sampled_from([0.0, 1000.0]))
    def claim(self, name: Name, owner: str, seconds: float) -> None:
        holder = self.holders.get(name)
        try:
            lease, stored = self.directory.claim(name, owner, seconds)
        except NotFound:
            assert name not in self.logs
        except Unavailable:
            assert holder is not None
            assert holder[0] != owner
            assert holder[1] > 0
        else:
            assert holder is None or holder[0] == owner or holder[1] == 0
            assert (stored.generation, stored.entries) == (self.generations[name], len(self.logs[name]))
            assert all(lease.token >= old.token for old, _ in self.leases if old.name == name)
            self.valid[name], self.holders[name] = lease, (owner, seconds)
            self.leases.append((lease, stored.generation))

    @rule(data=st.data(), entries=st.integers(0, 3), keep=st.none() | st.integers(0, 2), fresh=st.booleans())
    def commit(self, data: st.DataObject, entries: int, keep: int | None, fresh: bool) -> None:
        """By anyone who ever had a lease, with the newest generation or the one known when it was claimed."""
        if not self.leases:
            return
        lease, known = data.draw(st.sampled_from(self.leases))
        name, current = lease.name, self.generations.get(lease.name, -1)
        generation = current if fresh else known
        added = [f"{self.written + i}".encode() for i in range(entries)]
        self.written += entries
        try:
            after = self.directory.commit(lease, generation, added, keep=keep)
        except LeaseLost:
            assert self.valid.get(name) != lease or generation != current
        else:
            assert self.valid[name] == lease
            assert generation == current
            self.generations[name] = current + 1
            assert after == current + 1
            log = self.logs[name]
            self.logs[name] = (log if keep is None else log[:keep]) + added

    @rule(data=st.data(), seconds=st.sampled_from([0.0, 1000.0]))
    def renew_or_release(self, data: st.DataObject, seconds: float) -> None:
        if not self.leases:
            return
        lease, _ = data.draw(st.sampled_from(self.leases))
        if seconds == 0:
            self.directory.release(lease)
        else:
            try:
                self.directory.renew(lease, seconds)
            except LeaseLost:
                assert self.valid.get(lease.name) != lease
                return
            assert self.valid[lease.name] == lease
        if self.valid.get(lease.name) == lease:
            self.holders[lease.name] = (lease.owner, seconds)

    @rule(name=names)
    def delete(self, name: Name) -> None:
        try:
            self.directory.delete(name, b"gone", 1000)
            assert name in self.logs
        except NotFound:
            assert name not in self.logs
        for kept in (self.logs, self.generations, self.valid, self.holders):
            kept.pop(name, None)  # type: ignore[attr-defined]

    @invariant()
    def holds_what_was_written(self) -> None:
        for name in NAMES:
            stored = self.directory.read(name)
            if name in self.logs:
                assert stored is not None
                assert (stored.generation, stored.deleted) == (self.generations[name], False)
                assert list(self.directory.log(name)) == self.logs[name]
            else:
                assert stored is None or stored.deleted


@pytest.fixture(params=["sqlite", "redis"])
def directory(request: pytest.FixtureRequest) -> Iterator[Directory]:
    folder = Path(tempfile.mkdtemp())
    where = str(folder / "s.sqlite") if request.param == "sqlite" else request.getfixturevalue("redis_server").url
    made = open_directory(where)
    yield made
    made.close()
    shutil.rmtree(folder)


def test_no_write_under_a_lost_lease_lands(directory):
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("Machine", (Fencing,), {"directory": directory})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))
