"""What a run is made of: frozen, keyword-only, units in the names. Unknown fields are errors by construction."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from segcore.errors import ConfigError

KIB, MIB, GIB = 2**10, 2**20, 2**30


class Cell(NamedTuple):
    """One KV head of one layer; the query heads of a GQA group belong to their KV head's cell."""

    layer: int
    kv_head: int


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """How a stream is cut, and what each cell sees of the past (design, sections 2 to 6).

    policy: the rule for the prefix, a name of `segcore.policies`.
    segment_tokens: S, tokens of a segment.
    sink_tokens: first tokens of the stream that every cell keeps.
    tail_tokens: M, tokens before the segment that a local cell sees.
    reader_tail_tokens: M_r, the same for a reader cell.
    retrieved_tokens: R, past tokens chosen for the reader cells at a refresh point.
    block_tokens: retrieved tokens come in stream-aligned blocks of this many.
    query_window_tokens: L_q, latest queries that do the choosing.
    refresh_tokens: choose anew every so many tokens of a segment; None: at its start and at turn marks only.
    selectors: the cells whose queries and keys choose for all readers.
    readers: the cells that read retrieved tokens; None means every cell.
    """

    policy: str = "segmented"
    segment_tokens: int = 1024
    sink_tokens: int = 4
    tail_tokens: int = 512
    reader_tail_tokens: int = 256
    retrieved_tokens: int = 512
    block_tokens: int = 16
    query_window_tokens: int = 64
    refresh_tokens: int | None = None
    selectors: tuple[Cell, ...] = ()
    readers: tuple[Cell, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "selectors", tuple(Cell(*c) for c in self.selectors))
        if self.readers is not None:
            object.__setattr__(self, "readers", tuple(Cell(*c) for c in self.readers))
        _require_at_least(self, 1, "segment_tokens", "block_tokens", "query_window_tokens")
        _require_at_least(self, 0, "sink_tokens", "tail_tokens", "reader_tail_tokens", "retrieved_tokens")
        if self.sink_tokens > self.segment_tokens:
            raise ConfigError(f"sink_tokens={self.sink_tokens} must fit into the first segment ({self.segment_tokens})")
        if self.retrieved_tokens % self.block_tokens:
            raise ConfigError(
                f"retrieved_tokens={self.retrieved_tokens} must be a multiple of block_tokens={self.block_tokens}"
            )
        if self.refresh_tokens is not None:
            _require_at_least(self, 1, "refresh_tokens")
        if self.refresh_tokens is not None and not 1 <= self.refresh_tokens < self.segment_tokens:
            raise ConfigError(
                f"refresh_tokens={self.refresh_tokens} must lie between 1 and segment_tokens - 1, or be None"
            )

    @property
    def prefix_tokens(self) -> int:
        """P: rows before the segment, the same for every cell (design, section 3)."""
        return self.sink_tokens + max(self.tail_tokens, self.retrieved_tokens + self.reader_tail_tokens)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where past KV lives. Budgets are bytes; what doesn't fit is refused, never dropped.

    host_bytes: blocks kept in host memory; beyond it the oldest stay on disk only.
    disk_bytes: blocks on disk; None: as much as the disk holds.
    directory: folder of the disk tier; None: host memory only.
    """

    host_bytes: int = 8 * GIB
    disk_bytes: int | None = None
    directory: Path | None = None

    def __post_init__(self) -> None:
        _require_at_least(self, 0, "host_bytes")
        if self.disk_bytes is not None:
            _require_at_least(self, 0, "disk_bytes")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One engine: how it runs, and what it accepts.

    chunk_tokens: prefill step. Steps end at multiples of it within a segment, so that results don't depend, to the
        last bit, on how the stream arrived; smaller steps mean a shorter wait after the last token.
    max_sessions: open sessions, each with a device state of constant size.
    max_session_tokens: longest stream.
    max_pending_tokens: tokens accepted ahead of the engine before `append` makes its caller wait.
    """

    segment: SegmentConfig = field(default_factory=SegmentConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    chunk_tokens: int = 1024
    max_sessions: int = 16
    max_session_tokens: int = 10_000_000
    max_pending_tokens: int = 1024

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "chunk_tokens", "max_sessions", "max_session_tokens", "max_pending_tokens")


def _require_at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
