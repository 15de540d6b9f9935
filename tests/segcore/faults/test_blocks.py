"""Blocks that are damaged, lost or of others: each is detected and counted, and costs time, never a wrong token."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segcore.config import CacheConfig
from segcore.errors import BlockDamaged, BlockMismatch
from segcore.fingerprint import Fingerprint
from segcore.model import CausalLM
from segcore.pastkv.directory import DirectoryTier, LocalDisk
from segcore.pastkv.format import BlockFormat
from segcore.pastkv.manager import PastKVManager
from tests.conftest import tiny_model, tiny_segment
from tests.segcore.blocks import TOKENS, block, bulk, key, same, same_tensors
from tests.segcore.engines import engine_of
from tests.segcore.faults.engines import KV_BYTES, LITTLE, STREAM, answer, files, read, settled


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), bit=st.integers(0, 7), where=st.sampled_from(["header", "head", "bulk", "anywhere"]))
def test_no_flipped_bit_is_silent(data, bit, where):
    """Wherever it is: what is read is right, or the error is typed."""
    blocks, one = BlockFormat(Fingerprint(model="m")), block(3)
    encoded = bytearray(b"".join(blocks.encode(one)))
    header = int.from_bytes(encoded[:8], "little") + 8
    ranges = {"header": (0, header), "bulk": (len(encoded) - one.kv_SC2D.nbytes, len(encoded))}
    ranges |= {"head": (header, ranges["bulk"][0]), "anywhere": (0, len(encoded))}
    at = data.draw(st.integers(ranges[where][0], ranges[where][1] - 1))
    encoded[at] ^= 1 << bit
    damaged = 0

    def read(wanted):
        return [bytes(encoded[start:stop]) for start, stop in wanted]

    try:
        assert same(blocks.rows(one.key, read, torch.arange(TOKENS)), one.kv_SC2D)
    except (BlockDamaged, BlockMismatch):
        damaged += 1
    try:
        head = blocks.head(one.key, read)
        assert same_tensors(head.index, one.index)
        assert same_tensors(head.boundary, one.boundary)
    except (BlockDamaged, BlockMismatch):
        damaged += 1
    assert damaged == (2 if at < header else 1)


@given(kept=st.floats(0, 0.999), added=st.binary(max_size=3))
@settings(max_examples=60, deadline=None)
def test_no_truncation_is_silent(kept, added):
    blocks, one = BlockFormat(Fingerprint()), block(4)
    encoded = b"".join(blocks.encode(one))
    short = encoded[: int(len(encoded) * kept)]

    def read(wanted):
        return [short[start:stop] for start, stop in wanted]

    with pytest.raises(BlockDamaged):
        blocks.rows(one.key, read, torch.tensor([TOKENS - 1]))
    if len(short) < len(encoded) - one.kv_SC2D.nbytes:
        with pytest.raises(BlockDamaged):
            blocks.head(one.key, read)


@pytest.mark.parametrize(
    ("kind", "damage"),
    [(kind, damage) for kind in ("directory", "shared") for damage in ("flipped", "removed")]
    + [("directory", "truncated"), ("directory", "emptied")],
)
def test_damaged_files(make_engine, tmp_path, undisturbed, kind, damage):
    engine = make_engine(**{kind: tmp_path if kind == "directory" else str(tmp_path)})
    read(engine)
    settled(engine)
    assert len(files(tmp_path)) >= len(STREAM) // 16
    for path in files(tmp_path):
        data = bytearray(path.read_bytes())
        if damage == "flipped":
            for page in range(4):
                data[-1 - page * KV_BYTES // 4] ^= 0x10
        path.write_bytes(data)
        if damage == "truncated":
            os.truncate(path, len(data) // 2)
        elif damage == "emptied":
            os.truncate(path, 0)
        elif damage == "removed":
            path.unlink()
    assert answer(engine) == undisturbed
    tier = "disk" if kind == "directory" else "shared"
    fault = "BlockMissing" if damage == "removed" else "BlockDamaged"
    assert engine.stats().faults[f"{tier}.{fault}"] > 0


def test_damaged_in_one_tier_is_read_from_the_next(make_engine, tmp_path, undisturbed):
    engine = make_engine(directory=tmp_path / "d", shared=str(tmp_path / "s"))
    read(engine)
    settled(engine)
    for path in files(tmp_path / "d"):
        os.truncate(path, 100)
    assert answer(engine) == undisturbed
    assert set(engine.stats().faults) == {"disk.BlockDamaged"}
    # Nothing was run again: the next tier had it.


OTHERS = {"layout": 999}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Fingerprint)])
def test_a_block_of_another_fingerprint_is_refused(tmp_path, field):
    """Each field in turn; a file of the other in this one's place."""
    mine = Fingerprint(**{f.name: f"my {f.name}" for f in dataclasses.fields(Fingerprint) if f.name != "layout"})
    other = dataclasses.replace(mine, **{field: OTHERS.get(field, "other")})
    assert mine.digest != other.digest
    managers = [PastKVManager(CacheConfig(), fingerprint) for fingerprint in (mine, other)]
    assert len({past.open_stream(None).root for past in managers}) == 2
    tiers = [LocalDisk(tmp_path, BlockFormat(fingerprint), None) for fingerprint in (mine, other)]
    tiers[1].put(block(0))
    shutil.copytree(tiers[1].folder, tiers[0].folder, dirs_exist_ok=True)
    for read_block in (lambda: tiers[0].rows(key(0), torch.tensor([0])), lambda: tiers[0].head(key(0))):
        with pytest.raises(BlockMismatch) as raised:
            read_block()
        assert raised.value.details["fields"] == field
    assert same(tiers[1].rows(key(0), torch.tensor([0])), bulk(0)[[0]])
    for tier in tiers:
        tier.close()


def other_weights() -> CausalLM:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-6
    return CausalLM(model)


DIFFERENT: dict[str, tuple[Callable[[], CausalLM] | None, dict[str, object]]] = {
    "weights": (other_weights, {}),
    "dtype": (lambda: CausalLM(tiny_model(dtype=torch.float32)), {}),
    "model": (None, {"model": "other"}),
    "tokenizer": (None, {"tokenizer": "other"}),
    "adapter": (None, {"adapter": "other"}),
    "segment": (None, {"segment": tiny_segment(query_window_tokens=5)}),
}


@pytest.fixture(scope="module")
def another(tiny_lm, tmp_path_factory) -> tuple[str, Path]:
    """An engine that has read the stream: the digest of its fingerprint, and the shared folder with its blocks."""
    folder = tmp_path_factory.mktemp("another")
    engine = engine_of(tiny_lm, cache=CacheConfig(shared=str(folder)))
    read(engine)
    settled(engine)
    engine.shutdown()
    return engine.fingerprint.digest, folder


@pytest.mark.slow
@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Fingerprint) if f.name != "layout"])
def test_engines_that_differ_share_nothing(make_engine, tmp_path, another, field):
    """Even if the other's files are put where its own would be."""
    model, changes = DIFFERENT[field]
    digest, folder = another
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    theirs = {path.name: path for path in files(tmp_path)}
    second = make_engine(*([model()] if model else []), shared=str(tmp_path), **changes)
    assert second.fingerprint.digest != digest
    read(second)
    settled(second)
    ours = [path for path in files(tmp_path) if path not in theirs.values()]
    assert len(ours) == len(theirs)
    assert not {path.name for path in ours} & theirs.keys()
    expected = answer(second)
    second.close("s")
    settled(second)
    for mine, other in zip(ours, theirs.values(), strict=True):
        shutil.copy(other, mine)
    third = make_engine(*([model()] if model else []), shared=str(tmp_path), **changes)
    read(third)
    assert answer(third) == expected
    assert third.stats().faults["shared.BlockMismatch"] > 0


def test_tenants_share_nothing(make_engine, tmp_path, undisturbed):
    engine = make_engine(directory=tmp_path, host_bytes=2 * LITTLE)
    read(engine, "a", tenant="a")
    settled(engine)
    count = len(files(tmp_path))
    read(engine, "same", tenant="a")
    settled(engine)
    assert len(files(tmp_path)) == count
    read(engine, "b", tenant="b")
    settled(engine)
    assert len(files(tmp_path)) == 2 * count
    assert answer(engine, "b") == undisturbed


def test_a_block_in_anothers_place_is_refused(make_engine, tmp_path, undisturbed):
    engine = make_engine(directory=tmp_path)
    read(engine)
    settled(engine)
    stored = files(tmp_path)
    contents = [path.read_bytes() for path in stored]
    for path, data in zip(stored, contents[1:] + contents[:1], strict=True):
        path.write_bytes(data)
    assert answer(engine) == undisturbed
    assert engine.stats().faults["disk.BlockMismatch"] > 0


def test_no_tier_left_at_all(make_engine, tmp_path, undisturbed):
    """Everything but the tokens is lost, host memory too, before the answer and within it."""
    engine = make_engine(directory=tmp_path, host_bytes=100 * KV_BYTES)
    read(engine)
    settled(engine)

    def lose() -> None:
        for name in engine._past._host.keys:
            engine._past._host.delete(name)
        for path in files(tmp_path):
            path.unlink()

    lose()

    assert answer(engine, at_token=lambda count: lose() if count in (3, 9) else None) == undisturbed


def test_a_fault_in_one_session_leaves_others_alone(make_engine, tmp_path, undisturbed, monkeypatch):
    engine = make_engine(directory=tmp_path, host_bytes=2 * LITTLE)
    read(engine, "a", tenant="a")
    settled(engine)
    for path in files(tmp_path):
        os.truncate(path, 10)
    read(engine, "b", tenant="b")
    assert answer(engine, "b") == undisturbed
    assert answer(engine, "a") == undisturbed


def test_every_read_fails_once(make_engine, tmp_path, undisturbed, monkeypatch):
    """A disk with an unreadable sector: that block is lost, the disk isn't left alone for it."""
    failed: set[str] = set()
    rows = DirectoryTier.rows

    def flaky(tier, name, rows_n):
        if name not in failed:
            failed.add(name)
            with tier._open(name):
                raise OSError(5, "Input/output error")
        return rows(tier, name, rows_n)

    monkeypatch.setattr(DirectoryTier, "rows", flaky)
    engine = make_engine(directory=tmp_path)
    read(engine)
    assert answer(engine) == undisturbed
    assert engine.stats().faults["disk.BlockDamaged"] == len(failed) > 0
    assert "disk.TierUnavailable" not in engine.stats().faults
