"""Sessions as things to move: restored from snapshots here, in another process, or from tokens alone (I4).

Every answer is held against the same stream on an engine of its own: fp64, greedy, token for token.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import torch

from segcore.config import CacheConfig
from segcore.engine.snapshot import Snapshot
from segcore.errors import (
    AlreadyExists,
    BlockDamaged,
    BlockMismatch,
    NotFound,
)
from segcore.model import CausalLM
from tests.conftest import tiny_model, tiny_segment
from tests.segcore.engines import POLICIES, STREAM, answer, at_rest, engine_of, fill
from tests.segcore.test_invariants import MATRIX


@pytest.mark.parametrize("policy", POLICIES)
def test_i4_a_restored_session_continues_as_if_never_interrupted(make_engine, policy):
    engine = make_engine(segment=MATRIX[policy])
    engine.open("s")
    fill(engine, "s", STREAM[:70], mark=True)
    with at_rest(engine):
        engine.append("s", STREAM[70:73])  # still waiting when the snapshot is taken
        engine.mark("s")
        data = engine.snapshot("s")
        engine.restore("same", data)
        assert engine.snapshot("same") == data
    engine.append("s", STREAM[73:])
    expected = answer(engine, "s", temperature=1.0, seed=3)
    other = make_engine(segment=MATRIX[policy])
    other.restore("t", data)
    other.append("t", STREAM[73:])
    assert answer(other, "t", temperature=1.0, seed=3) == expected
    assert len(set(expected)) > 3


@pytest.mark.slow
def test_i4_in_another_process_bit_for_bit(tiny_lm, tmp_path):
    """bf16, past KV in a shared folder: the other process gives the same bytes of state as this one, later."""
    lm = CausalLM(tiny_model(dtype=torch.bfloat16))
    shared = tmp_path / "shared"
    engine = engine_of(lm, cache=CacheConfig(shared=str(shared)))
    engine.open("s")
    fill(engine, "s", STREAM[:75], mark=True)
    engine.check_integrity()
    (tmp_path / "snapshot").write_bytes(engine.snapshot("s"))
    tokens = answer(engine, "s", 30)
    later = engine.snapshot("s")
    engine.shutdown()
    code = f"""
import torch
torch.set_num_threads(1)
from pathlib import Path
from segcore.config import CacheConfig
from segcore.model import CausalLM
from tests.conftest import tiny_model
from tests.segcore.engines import answer, engine_of
engine = engine_of(CausalLM(tiny_model(dtype=torch.bfloat16)), cache=CacheConfig(shared={str(shared)!r}))
engine.restore("s", Path({str(tmp_path / "snapshot")!r}).read_bytes())
assert engine.session_stats("s").tokens == 75
print(answer(engine, "s", 30))
Path({str(tmp_path / "later")!r}).write_bytes(engine.snapshot("s"))
assert not engine.stats().faults, engine.stats().faults
engine.shutdown()
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tokens)
    assert (tmp_path / "later").read_bytes() == later


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_alone_bring_a_session_back(make_engine, policy):
    """No tier has the blocks, and the state in the snapshot is damaged: the tokens are run again."""
    engine = make_engine(segment=MATRIX[policy])
    engine.open("s")
    fill(engine, "s", STREAM[:40], mark=True)
    answer(engine, "s", 5)
    fill(engine, "s", STREAM[40:], mark=True)
    data = engine.snapshot("s")
    other = make_engine(segment=MATRIX[policy])
    other.restore("s", flipped(data, places(data)["state.window.0.0.v_HND"][1] - 1))
    assert answer(other, "s") == answer(engine, "s")


def places(snapshot: bytes) -> dict[str, tuple[int, int]]:
    """Where in a snapshot's bytes each tensor begins and ends; "": the header."""
    data = 8 + int.from_bytes(snapshot[:8], "little")
    header = json.loads(snapshot[8:data])
    del header["__metadata__"]
    tensors = {name: (data + e["data_offsets"][0], data + e["data_offsets"][1]) for name, e in header.items()}
    return {"": (0, data)} | tensors


def flipped(data: bytes, at: int, bit: int = 6) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def test_no_flipped_bit_of_a_snapshot_is_silent(make_engine):
    """It is refused, or its state alone is given up, which the tokens bring back."""
    engine, random = make_engine(), Random(1)
    engine.open("s")
    fill(engine, "s", STREAM[:70], mark=True)
    with at_rest(engine):
        engine.append("s", STREAM[70:73])
        engine.mark("s")
        data = engine.snapshot("s")

    def read(data: bytes) -> Snapshot:
        return Snapshot.from_bytes(data, engine.fingerprint)

    def truth(snapshot: Snapshot) -> tuple[object, ...]:
        journal = snapshot.journal
        return snapshot.root, snapshot.keys, snapshot.marks, snapshot.pending, journal.tokens, journal.events

    assert read(data).marks == (73,)
    assert read(data).tensors is not None
    for name, (start, end) in places(data).items():
        for _ in range(1 if name else 200):
            damaged = flipped(data, random.randrange(start, end), random.randrange(8))
            if name.startswith("state."):
                assert read(damaged).tensors is None
            with suppress(BlockDamaged):
                assert truth(read(damaged)) == truth(read(data))


def test_a_snapshot_of_another_model_configuration_or_tenant_is_refused(make_engine):
    engine = make_engine(model="a")
    engine.open("s", tenant="one")
    fill(engine, "s", STREAM)
    data = engine.snapshot("s")
    with pytest.raises(BlockMismatch, match="another model"):
        make_engine(model="b").restore("s", data, tenant="one")
    with pytest.raises(BlockMismatch, match="another segment"):
        make_engine(model="a", segment=tiny_segment(tail_tokens=7)).restore("s", data, tenant="one")
    with pytest.raises(BlockMismatch, match="another tenant"):
        make_engine(model="a").restore("s", data)
    with pytest.raises(AlreadyExists):
        engine.restore("s", data, tenant="one")


@pytest.mark.parametrize("spoil", [lambda d: d[:100], lambda d: b"", lambda d: d[:-1], lambda d: b"x" * 50])
def test_a_broken_snapshot_is_refused(make_engine, spoil):
    engine = make_engine()
    engine.open("s")
    fill(engine, "s", STREAM)
    with pytest.raises(BlockDamaged):
        engine.restore("t", spoil(engine.snapshot("s")))
    with pytest.raises(NotFound):
        engine.flush("t")
