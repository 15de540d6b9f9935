"""What is prefetched isn't read twice, and never costs what is in use."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from segcore.errors import BlockMissing
from segcore.pastkv.directory import DirectoryTier
from segcore.pastkv.manager import HEADS_AHEAD, READERS, ROWS_SHARE
from tests.segcore.blocks import (
    BLOCK_BYTES,
    LAYOUT,
    TOKENS,
    bulk,
    close_segment,
    everything,
    gathers,
    same,
    same_tensors,
    stream_of,
)


def slower_only(make_past, tmp_path, seeds=4, **options):
    """A stream whose blocks are on disk alone, and much free host memory."""
    past = make_past(directory=tmp_path, **options)
    stream = stream_of(past, *range(seeds))
    past.settle()
    for key in stream.keys:
        past._host.delete(key)
    return past, stream


def test_what_was_prefetched_is_not_read_again(make_past, tmp_path, reads):
    past, stream = slower_only(make_past, tmp_path)
    positions = torch.tensor([3, 4, 50, 51, 119, 159])
    stream.prefetch(positions)
    past.settle()
    assert len(reads) == 4
    before = len(reads)
    assert same(stream.gather(positions), everything(*range(4))[positions])
    assert same(stream.gather(positions[1:3]), everything(*range(4))[positions[1:3]])
    assert len(reads) == before
    more = torch.tensor([3, 5])  # only what is missing is read
    assert same(stream.gather(more), everything(*range(4))[more])
    assert reads[before:] == [stream.keys[0]]


def test_a_gather_does_not_wait_for_other_blocks_prefetch(make_past, tmp_path, monkeypatch):
    """A prefetch that is under way is waited for, one that hasn't begun is taken over."""
    past, stream = slower_only(make_past, tmp_path)
    rows, go, begun = DirectoryTier.rows, threading.Event(), threading.Event()
    asked = []

    def held(tier, key, rows_n):
        asked.append(key)
        if key == stream.keys[0]:
            begun.set()
            assert go.wait(20)
        return rows(tier, key, rows_n)

    monkeypatch.setattr(DirectoryTier, "rows", held)
    past._reader = ThreadPoolExecutor(1)
    stream.prefetch(torch.tensor([0, TOKENS]))
    assert begun.wait(20)
    assert same(stream.gather(torch.tensor([TOKENS])), bulk(1)[[0]])
    threading.Timer(0.05, go.set).start()
    assert same(stream.gather(torch.tensor([0])), bulk(0)[[0]])
    assert sorted(asked) == sorted(stream.keys[:2])


def test_prefetch_keeps_to_the_budget_and_gives_way_to_blocks(make_past, tmp_path):
    past, stream = slower_only(make_past, tmp_path, seeds=12, blocks=12)
    stream.prefetch(torch.arange(12 * TOKENS))
    past.settle()
    past.check_integrity()
    assert 0 < past._rows.used_bytes <= 12 * BLOCK_BYTES // ROWS_SHARE
    for seed in range(12, 40):
        close_segment(stream, seed)
        stream.prefetch(torch.arange(0, stream.segments * TOKENS, 7))
        assert past.host_bytes <= 12 * BLOCK_BYTES
    assert gathers(stream, *range(40))


def test_a_wrong_guess_costs_only_its_reads(make_past, tmp_path, reads):
    past, stream = slower_only(make_past, tmp_path)
    stream.prefetch(torch.tensor([0, 1]))
    past.settle()
    assert same(stream.gather(torch.tensor([90])), everything(*range(4))[[90]])
    assert reads == [stream.keys[0], stream.keys[2]]
    stream.truncate(0)
    assert past.host_bytes == 0


def test_nothing_is_prefetched_that_is_in_memory(make_past, tmp_path, reads):
    past = make_past(directory=tmp_path)
    stream = stream_of(past, 0, 1)
    stream.prefetch(torch.arange(2 * TOKENS))
    past.settle()
    assert not reads
    assert make_past().open_stream(LAYOUT).prefetch(torch.tensor([], dtype=torch.long)) is None


def test_a_fault_in_prefetch_is_counted_and_harmless(make_past, tmp_path):
    past, stream = slower_only(make_past, tmp_path)
    path = past._disk._path(stream.keys[0])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the last page
    path.write_bytes(data)
    past._disk._path(stream.keys[1]).unlink()
    stream.prefetch(torch.arange(4 * TOKENS))
    past.settle()
    assert past.faults == {"disk.BlockDamaged": 1, "disk.BlockMissing": 1}
    for segment in (0, 1):
        with pytest.raises(BlockMissing) as raised:
            stream.gather(torch.tensor([segment * TOKENS]))
        assert raised.value.details["segment"] == str(segment)
    positions = torch.arange(2 * TOKENS, 4 * TOKENS)
    assert same(stream.gather(positions), everything(*range(4))[positions])


def test_a_stream_that_ends_during_prefetch_leaves_nothing(make_past, tmp_path):
    past, stream = slower_only(make_past, tmp_path)
    for _ in range(20):
        fork = stream.fork()
        fork.prefetch(torch.arange(4 * TOKENS))
        fork.truncate(0)
    stream.prefetch(torch.arange(4 * TOKENS))
    stream.truncate(0)
    past.check_integrity()
    assert past.host_bytes == 0


def test_heads_are_read_ahead_of_their_use(make_past, tmp_path, monkeypatch):
    """A stream is taken up from a slow tier with several reads at once; what isn't asked for any more isn't read."""
    first = make_past(shared=str(tmp_path))
    keys = stream_of(first, *range(20)).keys
    first.settle()
    past, inside, read, head = make_past(shared=str(tmp_path)), threading.Barrier(READERS), [], DirectoryTier.head

    def slowly(tier, key, *, boundary):
        assert not boundary  # only the last one's is needed
        read.append(key)
        if len(read) <= READERS:
            inside.wait(30)  # all of them, or none gets on
        return head(tier, key, boundary=boundary)

    monkeypatch.setattr(DirectoryTier, "head", slowly)
    heads = past.heads(keys)
    for seed in range(3):
        made = next(heads)
        assert not made.boundary
        assert same_tensors(made.index, first.head(keys[seed]).index)
    heads.close()
    past.settle()
    assert set(keys[:3]) <= set(read) <= set(keys[: 3 + HEADS_AHEAD])


def test_reads_of_slower_tiers_are_in_their_callers_trace(make_past, tmp_path, monkeypatch):
    first = make_past(shared=str(tmp_path))
    keys = stream_of(first, *range(3)).keys
    first.settle()
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    past = make_past(shared=str(tmp_path))
    past.head(keys[0])  # nobody traces
    assert not exporter.get_finished_spans()
    with provider.get_tracer("test").start_as_current_span("caller") as caller:
        assert len(list(past.heads(keys))) == 3
    reads = [span for span in exporter.get_finished_spans() if span.name == "past KV read"]
    assert {span.attributes["block"] for span in reads} == set(keys)
    assert {(span.attributes["tier"], span.parent.span_id) for span in reads} == {("shared", caller.context.span_id)}
