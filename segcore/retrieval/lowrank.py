"""The index that ships: a segment's keys in few dimensions of eight bits find candidates, exact keys judge them.

Keys of a selector vary in few directions (of SmolLM2's 64, 24 hold 99% of what queries see of them). Each segment is
written in the directions of its own keys, so that nothing learned from one text is asked to fit another; no state
passes from segment to segment. Estimates from these codes nominate blocks; their exact keys, in host memory, are then
judged as the oracle's are. Of a short stream all are: exact.

Shapes: P segments of a page, C selectors, G query heads of a selector, W tokens of the query window, M = G * W,
N tokens of a segment, D head dimension, K rank, B blocks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from segcore.retrieval.base import IndexSpec, KeyIndex
from segcore.retrieval.choose import best_of_blocks, nominate
from segcore.retrieval.exhaustive import ExhaustiveIndex
from segcore.retrieval.pages import Pages
from segcore.retrieval.reached import ReachedIndex, can_reach
from segcore.retrieval.scan import can_scan, scan

ITERATIONS = 8


class LowRankIndex(KeyIndex):
    """Holds about `selectors * 3/8 head_dim` bytes a token on the device, and the exact keys in host memory."""

    _codes: Pages  # rows [C, K, N], int8
    _decoders: Pages  # rows [C, D, K]

    def __init__(self, spec: IndexSpec) -> None:
        super().__init__(spec)
        exact = ReachedIndex if can_reach(spec.device, spec.dtype) else ExhaustiveIndex
        self._exact = exact(dataclasses.replace(spec, device_budget_bytes=0))
        self._rank = max(1, 3 * spec.head_dim // 8)
        # Estimates need no more than the model's own precision, and no more than fp32.
        self._compute = torch.float32 if spec.dtype.itemsize > 2 else spec.dtype

    @property
    def device_bytes(self) -> int:
        return self._codes.device_bytes + self._decoders.device_bytes if self._segment else 0

    @property
    def host_bytes(self) -> int:
        spilled = self._codes.host_bytes + self._decoders.host_bytes if self._segment else 0
        return spilled + self._exact.host_bytes

    @property
    def allocated(self) -> list[Tensor]:
        if not self._segment:
            return []
        return self._codes.allocated + self._decoders.allocated + self._exact.allocated

    def keys(self, numbers_per_key: int) -> Iterator[Tensor]:
        return self._exact.keys(numbers_per_key)

    def _start(self) -> None:
        selectors, head_dim, rank = self._spec.selectors, self._spec.head_dim, self._rank
        row_bytes = selectors * rank * (self._segment + head_dim * self._compute.itemsize)
        device_rows = self._spec.device_budget_bytes // row_bytes
        self._codes = Pages((selectors, rank, self._segment), torch.int8, self._spec.device, device_rows)
        self._decoders = Pages((selectors, head_dim, rank), self._compute, self._spec.device, device_rows)

    def _append(self, keys_CND: Tensor) -> None:
        # On the device, wherever the keys come from: codes are the same when a stream is read back.
        codes_CKN, decoder_CDK = _compress(keys_CND.to(self._spec.device), self._rank)
        self._exact.append(keys_CND)
        self._codes.append(codes_CKN)
        self._decoders.append(decoder_CDK)

    def _search(self, queries_CGWD: Sequence[Tensor], *, first: int, stop: int, tokens: int) -> Tensor:
        blocks_B = self._all_nominated(first=first, stop=stop, tokens=tokens)
        if blocks_B is not None:
            return self._exact.judge(queries_CGWD, blocks_B, first=first, stop=stop, tokens=tokens)
        levels_CGW = self._exact.levels(queries_CGWD, first=first, stop=stop)
        estimates = self._estimates(queries_CGWD, levels_CGW / self._spec.head_dim**-0.5)
        best_B = best_of_blocks(estimates, first=first, stop=stop, block=self._spec.block)
        # The margin by which neighbours lend is one of scores.
        blocks_B = nominate(best_B * self._spec.head_dim**-0.5, self._most(tokens))
        chosen = self._exact.judge(queries_CGWD, blocks_B, first=first, stop=stop, tokens=tokens)
        if self._spec.recall.due():
            oracle = self._exact.search(queries_CGWD, first=first, stop=stop, tokens=tokens, block=self._spec.block)
            self._spec.recall.look(chosen, oracle)
        return chosen

    def _truncate(self, segments: int) -> None:
        self._exact.truncate(segments * self._segment)
        self._codes.truncate(segments)
        self._decoders.truncate(segments)

    def _unshare(self) -> None:
        self._exact = self._exact.fork()
        if self._segment:
            self._codes, self._decoders = self._codes.fork(), self._decoders.fork()

    def _estimates(self, queries_CGWD: Sequence[Tensor], levels_CGW: Tensor) -> Iterator[Tensor]:
        """Estimated scores in stream order, in pieces, before their scaling, and so are the levels."""
        queries = torch.stack(list(queries_CGWD)).to(self._compute)
        heads = queries.shape[1:3]
        step = self._step(self._spec.selectors * heads.numel() * self._segment)
        for codes_PCKN, decoders_PCDK in zip(self._codes, self._decoders, strict=True):
            q_PCMK = queries.flatten(1, 2) @ decoders_PCDK.to(self._spec.device, non_blocking=True)
            codes = codes_PCKN.to(self._spec.device, non_blocking=True)
            if can_scan(codes):
                yield scan(q_PCMK.unflatten(2, heads), codes, levels_CGW).flatten()
                continue
            for q, c in zip(q_PCMK.split(step), codes.split(step), strict=True):
                similarity = torch.bmm(q.flatten(0, 1), c.to(self._compute).flatten(0, 1))
                similarity = similarity.view(*q.shape[:2], *heads, -1)
                similarity -= levels_CGW[..., None].to(self._compute)
                best_PCGN = _window_max(similarity.flatten(0, 1)).unflatten(0, q.shape[:2])
                yield best_PCGN.sum(dim=(1, 2), dtype=torch.float32).flatten()


def _compress(keys_CND: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """codes_CKN, int8, and decoder_CDK, with keys about `decoder @ codes`: the keys' principal directions.

    The directions aren't centred: a mean is the first of them.
    """
    keys = keys_CND.float()
    basis_CDK = _principal(keys.mT @ keys, rank).to(keys)
    coordinates_CKN = (keys @ basis_CDK).mT
    steps_CK1 = coordinates_CKN.abs().amax(dim=2, keepdim=True).clamp_min(1e-30) / 127
    codes = (coordinates_CKN / steps_CK1).round().to(torch.int8)
    return codes, basis_CDK * steps_CK1.mT


def _principal(gram_CDD: Tensor, rank: int) -> Tensor:
    """An orthonormal basis near the span of the `rank` largest eigenvectors, by orthogonal iteration: [C, D, K], fp64.

    A GPU takes ten milliseconds and more for eigenvectors, and waits for the host; this is some products.
    """
    gram = gram_CDD.double()
    # A hair on the diagonal keeps factors defined where keys vary in fewer directions.
    gram = gram + 1e-9 * gram.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None].clamp_min(1e-30) * torch.eye(
        gram.shape[-1], dtype=gram.dtype, device=gram.device
    )
    basis = _any_basis(gram.shape[-1], rank, gram.device).expand(len(gram), -1, -1)
    for _ in range(ITERATIONS):
        product = gram @ basis
        factor, _ = torch.linalg.cholesky_ex(product.mT @ product)
        basis = torch.linalg.solve_triangular(factor.mT, product, upper=True, left=False)
    return basis


@functools.cache  # copying it to a GPU would wait for the GPU
def _any_basis(dim: int, rank: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.randn(dim, rank, dtype=torch.double, generator=torch.Generator().manual_seed(0)).to(device)


def _window_max(similarity_xGWN: Tensor) -> Tensor:
    """The maximum over the window, [x, G, N]."""
    if not similarity_xGWN.is_cpu or similarity_xGWN.dtype.itemsize != 2:
        return similarity_xGWN.amax(dim=2)
    # On CPUs torch reduces whole numbers of 16 bits ten times as fast as floats of 16 bits. Positive floats are in
    # the order of their bits, negative ones in the opposite order.
    bits = similarity_xGWN.view(torch.int16)
    positive, negative = bits.amax(dim=2), bits.amin(dim=2)
    return torch.where(positive < 0, negative, positive).view(similarity_xGWN.dtype)
