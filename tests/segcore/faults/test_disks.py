"""Disks that are full, read-only or swept: each fault is counted, and costs time, never a wrong token."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from segcore.errors import SessionFailed, StorageFull, TierUnavailable
from segcore.fingerprint import Fingerprint
from segcore.pastkv.directory import LocalDisk, SharedDirectory
from segcore.pastkv.format import BlockFormat
from tests.segcore.blocks import block, bulk, key, same
from tests.segcore.engines import SECONDS
from tests.segcore.faults.engines import KV_BYTES, STREAM, answer, files, read, settled


def test_a_full_budget_is_refused_or_held_in_memory(make_engine, tmp_path, undisturbed):
    engine = make_engine(directory=tmp_path, disk_bytes=0)
    engine.open("s")
    engine.append("s", STREAM)
    with pytest.raises(StorageFull, match="raise host_bytes"):
        engine.flush("s").result(SECONDS)
    with pytest.raises(SessionFailed):
        engine.append("s", [1])
    assert engine.stats().faults["disk.StorageFull"] > 0
    roomy = make_engine(directory=tmp_path, disk_bytes=0, host_bytes=100 * KV_BYTES)
    read(roomy)
    assert answer(roomy) == undisturbed
    assert roomy.stats().faults["disk.StorageFull"] > 0


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A tmpfs; skips where this process may not mount."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(make_engine, tmp_path, undisturbed):
    """A real ENOSPC: the disk takes two blocks. Another tier, or host memory, takes the rest."""
    with mounted(tmp_path / "tiny", "-t", "tmpfs", "-o", "size=64k", "tmpfs") as tiny:
        engine = make_engine(directory=tiny, host_bytes=100 * KV_BYTES)
        read(engine)
        assert answer(engine) == undisturbed
        settled(engine)
        assert engine.stats().faults["disk.StorageFull"] > 0
        assert not list(tiny.rglob("*.partial"))
        assert 0 < len(files(tiny)) < len(STREAM) // 16
        little = make_engine(directory=tiny)
        little.open("s")
        little.append("s", STREAM)
        with pytest.raises(StorageFull):
            little.flush("s").result(SECONDS)
        little.shutdown()
        engine.shutdown()


def test_a_full_disk_gives_up_blocks_that_nobody_uses(make_engine, tmp_path, undisturbed):
    with mounted(tmp_path / "tiny", "-t", "tmpfs", "-o", "size=256k", "tmpfs") as tiny:
        engine = make_engine(directory=tiny)
        for turn in range(6):
            engine.open(f"{turn}")
            engine.append(f"{turn}", [turn, *STREAM])
            engine.flush(f"{turn}").result(SECONDS)
            engine.close(f"{turn}")
        read(engine)
        assert answer(engine) == undisturbed
        engine.shutdown()


def test_a_file_size_limit(tmp_path):
    """What a write's end would exceed fails in the middle of it, with some bytes written."""
    disk = LocalDisk(tmp_path, BlockFormat(Fingerprint()), None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(StorageFull):
            disk.put(block(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.rglob("*.partial"))
    assert not disk.holds(key(0))
    disk.put(block(0))
    assert same(disk.rows(key(0), torch.tensor([1])), bulk(0)[[1]])
    disk.close()


def test_a_directory_that_turns_read_only(make_engine, tmp_path, undisturbed):
    """Root may write anywhere but on a file system that is mounted read-only."""
    with mounted(tmp_path / "mnt", "-t", "tmpfs", "tmpfs") as folder:
        engine = make_engine(directory=folder, host_bytes=100 * KV_BYTES)
        engine.open("s")
        engine.append("s", STREAM[:40])
        engine.flush("s").result(SECONDS)
        settled(engine)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        engine.append("s", STREAM[40:])
        engine.flush("s").result(SECONDS)
        assert answer(engine) == undisturbed
        assert engine.stats().faults["disk.TierUnavailable"] > 0
        with pytest.raises(TierUnavailable, match="can't be kept in"):
            make_engine(directory=folder)
        with pytest.raises(TierUnavailable, match="can't be kept in"):
            make_engine(shared=str(folder))
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        engine.shutdown()


def test_a_path_that_cannot_be_made_is_refused(make_engine, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        for option in ({"directory": path}, {"shared": str(path)}):
            with pytest.raises(TierUnavailable, match="can't be kept in"):
                make_engine(**option)


@pytest.mark.parametrize("kind", ["directory", "shared"])
def test_a_removed_tier_comes_back(make_engine, tmp_path, undisturbed, kind):
    folder = tmp_path / "past"
    engine = make_engine(**{kind: folder if kind == "directory" else str(folder)})
    read(engine)
    settled(engine)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert answer(engine) == undisturbed
    settled(engine)
    assert engine.stats().faults[f"{'disk' if kind == 'directory' else 'shared'}.BlockMissing"] > 0
    assert files(folder)


def test_a_shared_directory_swept_by_others(make_engine, tmp_path, undisturbed):
    """Blocks of a live session vanish again and again while it answers: another tier's budget has no room for them."""
    engine = make_engine(shared=str(tmp_path))
    sweeper = SharedDirectory(tmp_path, "other", BlockFormat(Fingerprint()), 5000)
    read(engine)
    settled(engine)

    def sweep(count: int) -> None:
        if count in (1, 9, 17):
            sweeper._scan()
            sweeper.put(block(count))

    assert answer(engine, at_token=sweep) == undisturbed
    assert engine.stats().faults["shared.BlockMissing"] > 0
