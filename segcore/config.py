"""What a run is made of: frozen, keyword-only, units in the names. Unknown fields are errors by construction."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from segcore.errors import ConfigError

KIB, MIB, GIB = 2**10, 2**20, 2**30


class Cell(NamedTuple):
    """One KV head of one layer; the query heads of a GQA group belong to their KV head's cell."""

    layer: int
    kv_head: int


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """How a stream is cut, and what a query sees of the past: a policy and its options, one subclass each.

    policy: its name, in `segcore.policies` too. segment_tokens: S, tokens of a segment.
    """

    policy: ClassVar[str]
    segment_tokens: int = 1024

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "segment_tokens")

    @property
    def refresh_points(self) -> int | None:
        """The prefix is chosen anew every so many tokens of a segment; None: at its start and at turn marks only."""
        return None

    @property
    def chooses_at_marks(self) -> bool:
        """Whether the prefix is chosen anew at turn marks."""
        return False

    @property
    def reread_at_marks(self) -> int:
        """Of the open segment's latest tokens, how many are run again once a turn mark has chosen."""
        return 0

    @property
    def prefix_tokens(self) -> int | None:
        """P: rows before the segment, the same for every cell; None: more and more."""
        return None

    def _normalise_cells(self, *names: str) -> None:
        for name in names:
            cells = getattr(self, name)
            if cells is not None:
                object.__setattr__(self, name, tuple(sorted({Cell(*cell) for cell in cells})))

    def _require_sinks_fit(self, sink_tokens: int) -> None:
        if sink_tokens > self.segment_tokens:
            raise ConfigError(f"sink_tokens={sink_tokens} must fit into the first segment ({self.segment_tokens})")


@dataclass(frozen=True, kw_only=True)
class FullConfig(SegmentConfig):
    """Everything is seen: the baseline, whose memory grows with the stream."""

    policy: ClassVar[str] = "full"


@dataclass(frozen=True, kw_only=True)
class StreamingConfig(SegmentConfig):
    """StreamingLLM: sink_tokens first tokens of the stream, and window_tokens before the segment."""

    policy: ClassVar[str] = "streaming"
    sink_tokens: int = 4
    window_tokens: int = 2044

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least(self, 0, "sink_tokens", "window_tokens")
        self._require_sinks_fit(self.sink_tokens)

    @property
    def prefix_tokens(self) -> int:
        """P: rows before the segment."""
        return self.sink_tokens + self.window_tokens


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(SegmentConfig):
    """What the policies that retrieve share (design, sections 2 to 6).

    sink_tokens: first tokens of the stream that every cell keeps, but those that see the segment alone.
    reader_tail_tokens: M_r, tokens before the segment that a reader cell sees.
    retrieved_tokens: R, past tokens chosen for the reader cells at a refresh point.
    query_window_tokens: L_q, latest queries that do the choosing.
    refresh_tokens: choose anew every so many tokens of a segment; None: at its start and at turn marks only.
    turn_marks: choose anew at turn marks; without it a question inside a segment goes unseen by what is retrieved.
    reread_tokens: of the open segment's latest tokens so many are run again once a turn mark has chosen, so that the
        question, too, sees what it chose.
    selectors: the cells whose queries and keys choose.
    """

    sink_tokens: int = 4
    reader_tail_tokens: int = 256
    retrieved_tokens: int = 512
    query_window_tokens: int = 64
    refresh_tokens: int | None = None
    turn_marks: bool = True
    reread_tokens: int = 0
    selectors: tuple[Cell, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._normalise_cells("selectors")
        _require_at_least(self, 1, "query_window_tokens")
        _require_at_least(self, 0, "sink_tokens", "reader_tail_tokens", "retrieved_tokens", "reread_tokens")
        self._require_sinks_fit(self.sink_tokens)
        if self.refresh_tokens is not None:
            _require_at_least(self, 1, "refresh_tokens")
            if self.refresh_tokens >= self.segment_tokens:
                raise ConfigError(
                    f"refresh_tokens={self.refresh_tokens} must lie between 1 and segment_tokens - 1, or be None"
                )

    @property
    def refresh_points(self) -> int | None:
        return self.refresh_tokens

    @property
    def chooses_at_marks(self) -> bool:
        return self.turn_marks

    @property
    def reread_at_marks(self) -> int:
        return self.reread_tokens if self.turn_marks else 0

    @property
    def prefix_tokens(self) -> int:
        return self.sink_tokens + self.retrieved_tokens + self.reader_tail_tokens


@dataclass(frozen=True, kw_only=True)
class SegmentedConfig(RetrievalConfig):
    """Segmented execution: sinks, a carried tail and retrieved tokens before the segment (design, sections 3 to 6).

    selection: "global": the selectors together choose for all readers; "cell": each reader chooses its own.
    index: how "global" searches: "lowrank", candidates first, or "exhaustive", every key at each refresh.
    question_tokens: with "global", the latest queries of the window that choose inside a segment, as at turn marks: a
        question's own. Those of the text before it look for their like, and of that a long past has more than there is
        room for.
    tail_tokens: M, tokens before the segment that a local cell sees.
    block_tokens: with "global", retrieved tokens come in stream-aligned blocks of this many.
    readers: the cells that read retrieved tokens; None means every cell that isn't in segment_only.
    segment_only: cells that see the open segment and nothing before it.
    """

    policy: ClassVar[str] = "segmented"
    selection: Literal["global", "cell"] = "global"
    index: Literal["lowrank", "exhaustive"] = "lowrank"
    question_tokens: int = 24
    tail_tokens: int = 512
    block_tokens: int = 16
    readers: tuple[Cell, ...] | None = None
    segment_only: tuple[Cell, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._normalise_cells("readers", "segment_only")
        _require_at_least(self, 0, "tail_tokens")
        _require_at_least(self, 1, "block_tokens", "question_tokens")
        if self.selection not in ("global", "cell"):
            raise ConfigError(f"selection={self.selection!r} must be 'global' or 'cell'")
        if self.index not in ("lowrank", "exhaustive"):
            raise ConfigError(f"index={self.index!r} must be 'lowrank' or 'exhaustive'")
        if self.selection == "cell" and self.selectors:
            raise ConfigError("selection='cell' lets each reader choose its own tokens; leave selectors empty")
        unit = 8 if self.selection == "cell" else self.block_tokens
        if self.retrieved_tokens % unit:
            raise ConfigError(f"retrieved_tokens={self.retrieved_tokens} must be a multiple of {unit}")
        both = set(self.readers or ()) & set(self.segment_only)
        if both:
            raise ConfigError(f"cells {sorted(map(tuple, both))} are both readers and segment_only")

    @property
    def prefix_tokens(self) -> int:
        return self.sink_tokens + max(self.tail_tokens, self.retrieved_tokens + self.reader_tail_tokens)


@dataclass(frozen=True, kw_only=True)
class LtriConfig(RetrievalConfig):
    """Ltri-LLM: semantic spans, cut by the attention of a probe layer, are retrieved (arXiv 2412.04757).

    selectors: retrieval heads of one layer, the probe. local_tokens: spans are cut within windows of this many tokens.
    span_min_tokens, span_max_tokens: length of a span. overlap: spans that overlap a better one by more (intersection
    over union) are dropped. vote_tokens: keys of a span that make up its index vector.
    """

    policy: ClassVar[str] = "ltri"
    local_tokens: int = 512
    span_min_tokens: int = 4
    span_max_tokens: int = 64
    overlap: float = 0.3
    vote_tokens: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least(self, 1, "local_tokens", "span_min_tokens", "vote_tokens")
        if not self.span_min_tokens <= self.span_max_tokens <= self.local_tokens:
            raise ConfigError("span_min_tokens <= span_max_tokens <= local_tokens must hold")
        if 0 < self.retrieved_tokens < self.span_max_tokens:
            raise ConfigError(
                f"retrieved_tokens={self.retrieved_tokens} must have room for a span of {self.span_max_tokens}, or be 0"
            )
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"overlap={self.overlap} must lie in [0, 1)")
        if len({cell.layer for cell in self.selectors}) > 1:
            raise ConfigError("policy 'ltri' has one probe layer: choose selectors of one layer")


@dataclass(frozen=True, kw_only=True)
class LongGenConfig(SegmentConfig):
    """LongGen: the middle layers see everything, the others a fixed pattern (arXiv 2410.01485).

    full_layers: layers that see everything; None: the middle third.
    sink_tokens, window_tokens: what the other layers see before the segment.
    stride_blocks: if set, they see, beside the window, every so many-th block of block_tokens (the first one included)
    and no sinks.
    """

    policy: ClassVar[str] = "longgen"
    full_layers: tuple[int, ...] | None = None
    sink_tokens: int = 64
    window_tokens: int = 1984
    stride_blocks: int | None = None
    block_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.full_layers is not None:
            object.__setattr__(self, "full_layers", tuple(sorted(set(self.full_layers))))
        _require_at_least(self, 0, "sink_tokens", "window_tokens")
        _require_at_least(self, 1, "block_tokens")
        if self.stride_blocks is not None:
            _require_at_least(self, 1, "stride_blocks")
        self._require_sinks_fit(self.sink_tokens)


@dataclass(frozen=True, kw_only=True)
class LagKVConfig(SegmentConfig):
    """LagKV: of each lag of the past, the tokens that differ most from the next lag are kept (arXiv 2504.04704).

    sink_tokens: first tokens, always kept. lag_tokens: L, tokens of a lag. keep: r, the share of a lag that is kept.
    """

    policy: ClassVar[str] = "lagkv"
    sink_tokens: int = 16
    lag_tokens: int = 1024
    keep: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least(self, 0, "sink_tokens")
        _require_at_least(self, 2, "lag_tokens")  # a standard deviation over channels needs a range over tokens
        if not 0 <= self.keep <= 1:
            raise ConfigError(f"keep={self.keep} must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class DuoConfig(SegmentConfig):
    """DuoAttention: retrieval heads see everything, streaming heads sinks and a recent window (arXiv 2410.10819).

    retrieval: the cells that see everything. sink_tokens, window_tokens: what the others see before the segment.
    """

    policy: ClassVar[str] = "duo"
    retrieval: tuple[Cell, ...] = ()
    sink_tokens: int = 64
    window_tokens: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self._normalise_cells("retrieval")
        _require_at_least(self, 0, "sink_tokens", "window_tokens")
        self._require_sinks_fit(self.sink_tokens)


SEGMENT_CONFIGS: dict[str, type[SegmentConfig]] = {
    config.policy: config
    for config in (FullConfig, StreamingConfig, SegmentedConfig, LongGenConfig, LagKVConfig, LtriConfig, DuoConfig)
}


def segment_config(policy: str, **options: Any) -> SegmentConfig:
    """The configuration of a policy by name. Raises ConfigError for an unknown policy or option."""
    if policy not in SEGMENT_CONFIGS:
        raise ConfigError(f"unknown policy {policy!r}; known: {', '.join(sorted(SEGMENT_CONFIGS))}")
    known = {field.name for field in fields(SEGMENT_CONFIGS[policy])}
    if unknown := set(options) - known:
        raise ConfigError(
            f"policy {policy!r} has no option {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}"
        )
    return SEGMENT_CONFIGS[policy](**options)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where past KV lives. Budgets are bytes; what doesn't fit is refused, never dropped while it is needed.

    device_bytes: latest blocks kept on the model's device too.
    host_bytes: blocks kept in host memory; beyond it the least recently used stay in the slower tiers only.
    directory: folder of the local disk tier; None: there is none. disk_bytes: None: as much as the disk holds.
    shared: the tier that replicas share, a folder or the address of a Redis server (redis://...); None: there is none.
    shared_bytes: budget of a shared folder. shared_lifetime_s: what nobody reads for so long leaves Redis.
    restore_bytes_per_s: the most that is read from slower tiers for streams that are taken up again; None: no limit.
    reuse: blocks of ended streams stay while there is room, for the next stream of the same tokens.
    boundary_segments: every so many segments a block holds what a stream goes on from, beside past KV; the cells that
        don't read make it large. A stream that is restored runs the segments after the last of them again.
    """

    device_bytes: int = 0
    host_bytes: int = 8 * GIB
    directory: Path | None = None
    disk_bytes: int | None = None
    shared: str | None = None
    shared_bytes: int | None = None
    shared_lifetime_s: int | None = None
    restore_bytes_per_s: int | None = None
    reuse: bool = True
    boundary_segments: int = 1

    def __post_init__(self) -> None:
        _require_at_least(self, 0, "device_bytes", "host_bytes")
        _require_at_least(self, 1, "boundary_segments")
        optional = {"disk_bytes": 0, "shared_bytes": 0, "shared_lifetime_s": 1, "restore_bytes_per_s": 1}
        for name, least in optional.items():
            if getattr(self, name) is not None:
                _require_at_least(self, least, name)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One engine: how it runs, and what it accepts.

    chunk_tokens: prefill step. Steps end at multiples of it within a segment, so that results don't depend, to the
        last bit, on how the stream arrived; smaller steps mean a shorter wait after the last token. On a GPU a step of
        a whole segment is one CUDA graph, and the quickest by far.
    slots: states on the device, all of one size, and the width of a decode pass; other sessions' states wait in host
        memory.
    decodes_per_chunk: tokens of every answer between two chunks of other sessions' prefill.
    slot_steps: turns after which a busy session gives its slot to one that waits for a slot.
    max_sessions: open sessions.
    max_session_tokens: longest stream.
    max_pending_tokens: tokens accepted ahead of the engine before `room` makes its caller wait; None: a segment. Less
        than a chunk is refused: the engine would wait for the chunk's rest, and its caller for room.
    attention: the backend, "flash4", "flash3", "flash2", "sdpa" or "reference"; "auto": the quickest there is, measured
        once the engine starts.
    compile: let torch fuse what each layer does around its attention: some seconds for each new shape of a pass, once.
        None: on a GPU.
    model, tokenizer, adapter: what past KV is the past of, beside the weights: names or hashes (`Fingerprint`).
    """

    segment: SegmentConfig = field(default_factory=lambda: SegmentedConfig())
    cache: CacheConfig = field(default_factory=CacheConfig)
    chunk_tokens: int = 1024
    slots: int = 8
    decodes_per_chunk: int = 8
    slot_steps: int = 64
    max_sessions: int = 64
    max_session_tokens: int = 10_000_000
    max_pending_tokens: int | None = None
    attention: str = "auto"
    compile: bool | None = None
    model: str = ""
    tokenizer: str = ""
    adapter: str = ""

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "chunk_tokens", "slots", "decodes_per_chunk", "slot_steps")
        _require_at_least(self, 1, "max_sessions", "max_session_tokens")
        if self.max_pending_tokens is not None:
            _require_at_least(self, min(self.chunk_tokens, self.segment.segment_tokens), "max_pending_tokens")


def _require_at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
