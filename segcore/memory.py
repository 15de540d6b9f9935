"""How much memory segcore takes: formulas, written from the definitions (docs/memory.md), and the engine's own bytes.

L layers, H KV heads, G query heads per KV head, d head dimension, V vocabulary, b bytes of a number, C tokens of a
chunk; S, P, M, M_r, R, L_q as in `segcore.config`. A state holds each key twice, unrotated and rotated, and each value
once: 3·d·b bytes a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from segcore.config import (
    DuoConfig,
    EngineConfig,
    FullConfig,
    LagKVConfig,
    LongGenConfig,
    LtriConfig,
    RetrievalConfig,
    SegmentConfig,
    SegmentedConfig,
    StreamingConfig,
)
from segcore.model import ModelSpec
from segcore.retrieval import IndexSpec
from segcore.retrieval.pages import PAGE_ROWS

Part = Literal["engine", "state", "past", "journal"]
Place = Literal["device", "host", "disk", "shared"]
Unit = Literal[
    "engine", "slot", "token in a slot", "session", "parked session", "fork", "token", "closed token", "segment"
]

POSITION_BYTES = 8
JOURNAL_TOKEN_BYTES, JOURNAL_EVENT_BYTES = 4, 8
CHECKSUM_BYTES, PAGE_TOKENS = 8, 16
# A block's file begins with names, shapes, checksums and the fingerprint, as text.
HEADER_BYTES = 1536


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that a device's memory is used up, or the host's, for which torch has no class."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def engine_bytes(device: torch.device, past_bytes: Mapping[str, int]) -> int:
    """Bytes that should not grow with the stream: weights, states and scratch.

    On a GPU: what torch holds there, on a CPU: the process's resident memory, either without the past KV in it.
    past_bytes: by tier.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) - past_bytes.get("device", 0)
    return int(psutil.Process().memory_info().rss) - past_bytes["host"]


@dataclass(frozen=True)
class Line:
    """One formula with its number: `bytes` for each `unit`, in `place`. at_most: a limit rather than a size."""

    name: str
    part: Part
    place: Place
    unit: Unit
    formula: str
    bytes: float
    at_most: bool = False


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """Cells that see alike.

    count: how many. see: rows of the prefix after so many closed tokens. room: rows set aside for it at first.
    growth: rows that a token adds in the long run. in_place: the segment becomes prefix where it stands.
    """

    count: int
    see: Callable[[int], int]
    room: int
    growth: float = 0
    in_place: bool = False

    def rows(self, closed: int, segment: int) -> int:
        """Rows allocated, the segment's included. A prefix that outgrows its room has it doubled."""
        room = self.room
        for end in range(segment, closed + 1, segment):
            need = self.see(end)
            if need > room:
                room = 2 * need if self.in_place else max(need, 2 * room)
        return room + segment


def lines(spec: ModelSpec, parameters: int, config: EngineConfig, tokens: int) -> list[Line]:
    """Every formula, for streams of `tokens` tokens on an engine of that configuration."""
    return [
        *_engine(spec, parameters, config, tokens),
        *_state(spec, config.segment, tokens),
        *_past(spec, config),
        *_search(spec, config.segment, tokens),
        *_journal(config, tokens),
    ]


def total(lines: Sequence[Line], config: EngineConfig, *, sessions: int, tokens: int) -> dict[Place, int]:
    """Bytes by place of so many sessions of `tokens` tokens each; past KV in host memory within its budget."""
    segments, slots = tokens // config.segment.segment_tokens, min(sessions, config.slots)
    count: dict[Unit, int] = {
        "engine": 1,
        "slot": slots,
        "token in a slot": slots * tokens,
        "session": sessions,
        "parked session": sessions - slots,
        "fork": 0,
        "token": sessions * tokens,
        "closed token": sessions * segments * config.segment.segment_tokens,
        "segment": sessions * segments,
    }
    sums: dict[Place, int] = {}
    for place in ("device", "host", "disk", "shared"):
        here = [line for line in lines if line.place == place]
        past = sum(line.bytes * count[line.unit] for line in here if line.part == "past")
        other = sum(line.bytes * count[line.unit] for line in here if line.part != "past")
        sums[place] = round(other + (min(past, config.cache.host_bytes) if place == "host" else past))
    return sums


def grows(spec: ModelSpec, config: SegmentConfig) -> bool:
    """Whether a state grows with its stream, so that slots aren't of one size."""
    return any(cells.growth for cells in _cells(spec, config))


def _engine(spec: ModelSpec, parameters: int, config: EngineConfig, tokens: int) -> Iterator[Line]:
    segment, b = config.segment, spec.dtype.itemsize
    yield Line("weights", "engine", "device", "engine", "parameters·b", parameters * b)
    # Rotations reach as far as a query sees; with original positions, as far as the stream.
    original = isinstance(segment, FullConfig | LongGenConfig | LagKVConfig | DuoConfig)
    prefixed = max(cells.rows(0, segment.segment_tokens) for cells in _cells(spec, segment))
    keys, reach = (max(tokens, prefixed), "T") if original else (prefixed, "(P+S)")
    rotations = 2 * max(2 * keys, 1024) * spec.head_dim * b
    yield Line("rotations", "engine", "device", "engine", f"2·2·{reach}·d·b", rotations, at_most=True)
    if config.cache.device_bytes and _readers(spec, segment):
        budget = config.cache.device_bytes
        yield Line("latest blocks", "engine", "device", "engine", "device_bytes", budget, at_most=True)


def _state(spec: ModelSpec, config: SegmentConfig, tokens: int) -> Iterator[Line]:
    """A slot, what a session has outside of it, and what a state weighs off the device."""
    size, cells, b = config.segment_tokens, _cells(spec, config), spec.dtype.itemsize
    row, closed = 3 * spec.head_dim * b, tokens // size * size
    allocated = row * sum(kind.count * kind.rows(closed, size) for kind in cells)
    live = row * sum(kind.count * (kind.see(closed) + tokens - closed) for kind in cells)
    growth = row * sum(kind.count * kind.growth for kind in cells)
    if growth:
        formula = "3·(rows a token adds, all cells)·d·b"
        yield Line("state that grows", "state", "device", "token in a slot", formula, growth)
        formula, rest = "3·(rows allocated, less those)·d·b", allocated - growth * tokens
        yield Line("fixed and spare rows", "state", "device", "slot", formula, rest)
    else:
        yield Line("keys, rotated keys, values", "state", "device", "slot", "3·L·H·(P+S)·d·b", allocated)
    choosing = list(_choosing(spec, config, tokens))
    yield from choosing
    yield Line("logits", "state", "device", "session", "V·b", spec.vocabulary * b)
    parked = live + sum(line.bytes for line in choosing if not line.at_most)
    lacking = row * _readers(spec, config) * _lacking(config, closed)
    cutting = sum(line.bytes for line in choosing if line.at_most)
    units: list[tuple[str, Unit, str]] = [
        ("live rows, choosing", "parked session", "3·(rows, all cells)·d·b + ..."),
        ("a fork; blocks are shared", "fork", "a parked state, once either has run"),
    ]
    for name, unit, formula in units:
        yield Line(name, "state", "host", unit, formula, parked - lacking, at_most=unit == "fork")
        if cutting or lacking:
            formula = "queries that cut; 3·readers·(span_max-1)·d·b"
            yield Line("what spans may take", "state", "host", unit, formula, cutting + lacking, at_most=True)


def _lacking(config: SegmentConfig, closed: int) -> int:
    """Retrieved rows that may lack: whole spans are taken until one doesn't fit."""
    if not isinstance(config, LtriConfig):
        return 0
    candidates = closed - config.sink_tokens - config.reader_tail_tokens
    return config.span_max_tokens - 1 if candidates > config.retrieved_tokens > 0 else 0


def _choosing(spec: ModelSpec, config: SegmentConfig, tokens: int) -> Iterator[Line]:
    """The queries that choose, and what they chose."""
    watched = _watched(spec, config)
    if not isinstance(config, RetrievalConfig) or not watched:
        return
    query, window = watched * spec.queries_per_kv_head * spec.head_dim * spec.dtype.itemsize, config.query_window_tokens
    yield Line("query windows", "state", "device", "slot", "watched·G·L_q·d·b", query * min(window, tokens))
    if isinstance(config, LtriConfig) and config.segment_tokens > window:
        cutting = query * (config.segment_tokens - window)
        formula = "watched·G·(S-L_q)·d·b"
        yield Line("queries that cut spans", "state", "device", "slot", formula, cutting, at_most=True)
    candidates = max(tokens // config.segment_tokens * config.segment_tokens - config.sink_tokens, 0)
    positions = POSITION_BYTES * _choices(spec, config) * min(config.retrieved_tokens, candidates)
    yield Line("retrieved positions", "state", "device", "slot", "8·choices·R", positions)


def _past(spec: ModelSpec, config: EngineConfig) -> Iterator[Line]:
    """Blocks of closed segments, in every tier that there is."""
    segment, number = config.segment, spec.head_dim * spec.dtype.itemsize
    if not isinstance(segment, RetrievalConfig) or not _readers(spec, segment):
        return
    bulk = 2 * _readers(spec, segment) * number
    index: float = _watched(spec, segment) * number
    formula, spans = "watched·d·b", isinstance(segment, LtriConfig)
    if isinstance(segment, LtriConfig):  # the shortest spans are the most: each a vector, a start and a length
        index = (index + 2 * POSITION_BYTES) / segment.span_min_tokens
        formula = "(watched·d·b + 16)/span_min"
    # Of those that hold one, spread over all.
    boundary = _boundary_bytes(spec, segment) / config.cache.boundary_segments
    checksums = CHECKSUM_BYTES * -(-segment.segment_tokens // PAGE_TOKENS)
    tiers: dict[Place, bool] = {"host": True, "disk": bool(config.cache.directory), "shared": bool(config.cache.shared)}
    for place in (place for place, there in tiers.items() if there):
        yield Line("past KV of the readers", "past", place, "closed token", "2·readers·d·b", bulk)
        yield Line("index", "past", place, "closed token", formula, index, at_most=spans)
        yield Line("boundary", "past", place, "segment", "see docs/memory.md", boundary)
        if place != "host":
            yield Line("checksums, header", "past", place, "segment", "8·S/16 + 1.5 KiB", checksums + HEADER_BYTES)


def _search(spec: ModelSpec, config: SegmentConfig, tokens: int) -> Iterator[Line]:
    """What a session searches of all its closed segments, apart from blocks; `segcore.retrieval` holds it in pages."""
    watched, segments = _watched(spec, config), tokens // config.segment_tokens
    if not isinstance(config, SegmentedConfig) or config.selection == "cell" or not watched:
        return
    keys, budget = watched * spec.head_dim * spec.dtype.itemsize, IndexSpec.device_budget_bytes
    if config.index == "exhaustive":
        yield from _paged("keys", "watched·d·b", keys, config, segments, budget // (keys * config.segment_tokens))
        return
    codes = watched * max(1, 3 * spec.head_dim // 8)
    decoders = codes * spec.head_dim * min(spec.dtype.itemsize, 4)
    device_rows = budget // (codes * config.segment_tokens + decoders)
    yield from _paged("keys", "watched·d·b", keys, config, segments, 0)
    yield from _paged("codes", "watched·3d/8", codes, config, segments, device_rows)
    share = decoders / config.segment_tokens
    yield from _paged("decoders", "watched·d·3d/8·min(b,4)/S", share, config, segments, device_rows)


def _paged(
    name: str, formula: str, size: float, config: SegmentConfig, segments: int, device_rows: int
) -> Iterator[Line]:
    """A table in pages, a row for each segment, `size` bytes a token; beyond `device_rows`, its pages are the host's.

    The first page doubles from one row; when it is full, whole pages follow.
    """
    page = min(1 << max(segments - 1, 0).bit_length(), PAGE_ROWS)
    rows = max(-(-segments // page), 1) * page
    on_device = min(rows, device_rows // page * page) / rows
    spare = size * config.segment_tokens * (rows - segments) if segments else 0
    shares: list[tuple[Place, float]] = [("device", on_device), ("host", 1 - on_device)]
    for place, share in shares:
        if share:
            yield Line(f"{name} searched", "past", place, "closed token", formula, size * share)
            yield Line(f"{name} searched: room", "past", place, "session", "rows of pages to fill", spare * share)


def _boundary_bytes(spec: ModelSpec, config: RetrievalConfig) -> int:
    """What it takes to go on after a segment: queries, choice, logits, and the prefix of cells that don't read."""
    b = spec.dtype.itemsize
    queries = _watched(spec, config) * spec.queries_per_kv_head * config.query_window_tokens * spec.head_dim * b
    chosen = POSITION_BYTES * _choices(spec, config) * config.retrieved_tokens
    tail = config.sink_tokens + config.tail_tokens if isinstance(config, SegmentedConfig) else 0
    return queries + chosen + spec.vocabulary * b + 2 * _local(spec, config) * tail * spec.head_dim * b


def _journal(config: EngineConfig, tokens: int) -> Iterator[Line]:
    """Tokens and passes, in arrays that keep up to a sixteenth, and seven numbers, in reserve."""
    size, chunk, refresh = config.segment.segment_tokens, config.chunk_tokens, config.segment.refresh_points
    cuts = {*range(chunk, size, chunk), *range(refresh or size, size, refresh or size), size}
    events = JOURNAL_EVENT_BYTES * len(cuts) / size
    yield Line("journal: tokens", "journal", "host", "token", "4", JOURNAL_TOKEN_BYTES)
    yield Line("journal: prefill passes", "journal", "host", "token", "8·(passes of a segment)/S", events)
    reserve = (JOURNAL_TOKEN_BYTES + events) * tokens / 16 + 7 * (JOURNAL_TOKEN_BYTES + JOURNAL_EVENT_BYTES)
    yield Line("journal: reserve", "journal", "host", "session", "1/16 of both + 84", reserve, at_most=True)


def _cells(spec: ModelSpec, config: SegmentConfig) -> list[_Cells]:
    """The cells of a model by what they see of the past."""
    every = spec.layers * spec.kv_heads
    match config:
        case FullConfig():
            return [_dense(every)]
        case StreamingConfig():
            return [_sparse(every, config.sink_tokens + config.window_tokens)]
        case RetrievalConfig():
            return _retrieving(spec, config)
        case LongGenConfig():
            third = spec.layers // 3
            full = spec.layers - 2 * third if config.full_layers is None else len(config.full_layers)
            dense = full * spec.kv_heads
            return [_dense(dense), _strided(every - dense, config)]
        case DuoConfig():
            dense = len(config.retrieval)
            return [_dense(dense), _sparse(every - dense, config.sink_tokens + config.window_tokens)]
        case LagKVConfig():
            return [_lagged(every, config)]
    raise NotImplementedError(f"policy {config.policy!r} has no formula")


def _dense(count: int) -> _Cells:
    return _Cells(count=count, see=lambda closed: closed, room=0, growth=1, in_place=True)


def _sparse(count: int, rows: int) -> _Cells:
    return _Cells(count=count, see=lambda closed: min(closed, rows), room=rows)


def _strided(count: int, config: LongGenConfig) -> _Cells:
    room, stride = config.sink_tokens + config.window_tokens, config.stride_blocks
    if stride is None:
        return _sparse(count, room)
    block, cycle = config.block_tokens, config.block_tokens * stride

    def see(closed: int) -> int:
        before = max(closed - config.window_tokens, 0)
        return before // cycle * block + min(before % cycle, block) + closed - before

    return _Cells(count=count, see=see, room=room, growth=1 / stride)


def _lagged(count: int, config: LagKVConfig) -> _Cells:
    kept = int(config.keep * config.lag_tokens)

    def see(closed: int) -> int:
        compressed = max((closed - config.sink_tokens) // config.lag_tokens - 1, 0)  # the last full lag stays whole
        return closed - compressed * (config.lag_tokens - kept)

    return _Cells(count=count, see=see, room=0, growth=kept / config.lag_tokens)


def _retrieving(spec: ModelSpec, config: RetrievalConfig) -> list[_Cells]:
    """Readers, local cells, and cells that see their segment alone."""
    every = spec.layers * spec.kv_heads
    readers, local = _readers(spec, config), _local(spec, config)
    tail = config.tail_tokens if isinstance(config, SegmentedConfig) else config.reader_tail_tokens
    read = config.sink_tokens + config.retrieved_tokens + config.reader_tail_tokens
    return [_sparse(readers, read), _sparse(local, config.sink_tokens + tail), _sparse(every - readers - local, 0)]


def _readers(spec: ModelSpec, config: SegmentConfig) -> int:
    """Cells whose keys and values go to past KV; without retrieved tokens nobody reads."""
    if not isinstance(config, RetrievalConfig) or not config.retrieved_tokens:
        return 0
    every = spec.layers * spec.kv_heads
    if isinstance(config, SegmentedConfig):
        return every - len(config.segment_only) if config.readers is None else len(config.readers)
    return every


def _local(spec: ModelSpec, config: RetrievalConfig) -> int:
    alone = len(config.segment_only) if isinstance(config, SegmentedConfig) else 0
    return spec.layers * spec.kv_heads - _readers(spec, config) - alone


def _watched(spec: ModelSpec, config: SegmentConfig) -> int:
    """Cells whose queries and keys choose."""
    readers = _readers(spec, config)
    if not isinstance(config, RetrievalConfig) or not readers:
        return 0
    own = isinstance(config, SegmentedConfig) and config.selection == "cell"
    return readers if own else len(config.selectors)


def _choices(spec: ModelSpec, config: RetrievalConfig) -> int:
    """Rows of retrieved positions: one for all readers, or one for each."""
    return _readers(spec, config) if isinstance(config, SegmentedConfig) and config.selection == "cell" else 1
