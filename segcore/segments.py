"""Where a stream is cut: arithmetic on counts, no tensors.

A cut is a function of the stream and its marks alone, never of how the tokens arrived (design, section 1). That makes
chopping invariance (I3) hold to the last bit: the same forward passes run over the same tokens.
"""

from __future__ import annotations

from segcore.config import SegmentConfig


def tokens_to_next_cut(filled: int, segment: SegmentConfig, chunk_tokens: int) -> int:
    """How many tokens the next forward pass may take when `filled` tokens of the open segment are done.

    It ends at the next of: the segment's end, a refresh point, a multiple of `chunk_tokens`; always at least 1.
    """
    assert 0 <= filled < segment.segment_tokens
    cuts = [segment.segment_tokens, (filled // chunk_tokens + 1) * chunk_tokens]
    if segment.refresh_points is not None:
        cuts.append((filled // segment.refresh_points + 1) * segment.refresh_points)
    return min(cuts) - filled


def is_refresh_point(filled: int, segment: SegmentConfig) -> bool:
    """Whether the prefix is chosen anew after `filled` tokens of an open, not yet full segment."""
    return segment.refresh_points is not None and filled > 0 and filled % segment.refresh_points == 0
