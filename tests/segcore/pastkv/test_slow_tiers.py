"""Tiers that are slow, busy or failing while streams go on, end, and read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from segcore.errors import StorageFull, TierUnavailable
from segcore.pastkv import guard
from segcore.pastkv.directory import DirectoryTier
from tests.segcore.blocks import BLOCK_BYTES, close_segment, gathers, stream_of


def test_a_failed_write_is_tried_again(make_past, tmp_path, monkeypatch):
    past = make_past(directory=tmp_path)
    put = DirectoryTier.put
    with monkeypatch.context() as patch:
        patch.setattr(DirectoryTier, "put", raising(StorageFull("full")))
        stream = stream_of(past, 0)
        past.settle()
    assert not past._disk.holds(stream.keys[0])
    monkeypatch.setattr(DirectoryTier, "put", put)
    close_segment(stream, 1)
    past.settle()
    assert all(past._disk.holds(key) for key in stream.keys)


def raising(error: Exception) -> Callable[..., None]:
    def act(*args: object, **kwargs: object) -> None:
        raise error

    return act


def test_a_bug_in_a_tier_is_logged_and_counted(make_past, tmp_path, monkeypatch, caplog):
    past = make_past(directory=tmp_path)
    monkeypatch.setattr(DirectoryTier, "put", raising(RuntimeError("a bug")))
    stream = stream_of(past, 0)
    past.settle()
    assert past.faults["disk.RuntimeError"] == 1
    assert "a bug" in caplog.text
    assert gathers(stream, 0)


@pytest.mark.parametrize("reuse", [True, False])
def test_closing_while_writes_are_pending(make_past, tmp_path, monkeypatch, reuse):
    put = DirectoryTier.put

    def slow(tier, block, spare=()):
        time.sleep(0.05)
        put(tier, block, spare)

    monkeypatch.setattr(DirectoryTier, "put", slow)
    past = make_past(directory=tmp_path / "d", shared=str(tmp_path / "s"), reuse=reuse)
    stream = stream_of(past, *range(4))
    stream.truncate(2)
    past.close()
    assert not list((tmp_path / "d").glob("engine-*"))
    assert len(list((tmp_path / "s").rglob("*.safetensors"))) >= 2
    stream.truncate(0)


def test_a_stream_that_ends_while_it_is_written_leaves_nothing(make_past, tmp_path, monkeypatch):
    put, begun, go = DirectoryTier.put, threading.Event(), threading.Event()

    def held(tier, block, spare=()):
        begun.set()
        assert go.wait(20)
        put(tier, block, spare)

    monkeypatch.setattr(DirectoryTier, "put", held)
    past = make_past(directory=tmp_path, reuse=False)
    stream = stream_of(past, 0, 1)
    assert begun.wait(20)
    stream.truncate(0)
    go.set()
    past._writer.submit(lambda: None).result()
    assert not list(tmp_path.rglob("*.safetensors"))
    assert past.used_bytes == {"host": 0, "disk": 0}


def test_host_memory_waits_for_a_slow_tier(make_past, tmp_path, monkeypatch):
    put = DirectoryTier.put

    def slow(tier, block, spare=()):
        time.sleep(0.02)
        put(tier, block, spare)

    monkeypatch.setattr(DirectoryTier, "put", slow)
    past = make_past(blocks=2.5, directory=tmp_path)
    stream = stream_of(past, *range(8))
    assert past.host_bytes <= 2.5 * BLOCK_BYTES
    assert gathers(stream, *range(8))


def test_blocks_that_are_being_written_count(make_past, tmp_path, monkeypatch):
    """Even if nobody uses them any more: else a slow disk's queue would hold memory that no budget knows of."""
    put, go = DirectoryTier.put, threading.Event()

    def held(tier, block, spare=()):
        assert go.wait(20)
        put(tier, block, spare)

    monkeypatch.setattr(DirectoryTier, "put", held)
    past = make_past(blocks=2.5, directory=tmp_path)
    for seed in (0, 1):
        stream_of(past, seed).truncate(0)
    third = threading.Thread(target=stream_of, args=(past, 2))
    third.start()
    third.join(0.2)
    waited, blocks = third.is_alive(), len(past._host.keys)
    go.set()
    third.join()
    assert waited
    assert blocks == 2


def test_the_books_are_free_while_a_tier_is_slow(make_past, tmp_path, monkeypatch):
    """A tier that hangs in a look-up, a read or a write holds nobody up who doesn't need it."""
    past = make_past(blocks=2.4, directory=tmp_path)
    stream = stream_of(past, 0, 1)
    past.settle()
    begun, go = threading.Event(), threading.Event()

    def hang(*args: object) -> bool:
        begun.set()
        assert go.wait(20)
        return True

    monkeypatch.setattr(DirectoryTier, "holds", hang)
    preparing = threading.Thread(target=close_segment, args=(stream, 2))
    preparing.start()
    assert begun.wait(20)
    free = past._lock.acquire(timeout=5)
    go.set()
    assert free
    past._lock.release()
    preparing.join()


def test_a_tier_that_fails_is_left_alone_for_a_while(make_past, tmp_path, monkeypatch):
    past = make_past(shared=str(tmp_path))
    stream = stream_of(past, 0)
    past.settle()
    tries = []

    def gone(tier, key):
        tries.append(key)
        raise TierUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(DirectoryTier, "holds", gone)
        for _ in range(10):
            assert not past.holds("absent")
    assert len(tries) == 1
    assert past.faults["shared.TierUnavailable"] == 1
    past._host.delete(stream.keys[0])
    with pytest.raises(TierUnavailable):
        stream.gather(torch.tensor([0]))
    monkeypatch.setattr(guard.time, "monotonic", lambda: time.perf_counter() + 1e9)
    assert gathers(stream, 0)
