"""A block as bytes: safetensors, with a checksum for every tensor and, in the bulk, for every page of tokens.

Its header says what it is: the key and every field of the fingerprint. A reader checks both before anything else.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from segcore.errors import BlockDamaged, BlockMismatch
from segcore.fingerprint import Fingerprint
from segcore.pastkv.base import Block, BlockHead

# A read is verified page by page, so that a few tokens of a block cost a few pages, not the block.
PAGE_TOKENS = 16
_KV, _PAGES, _INDEX, _BOUNDARY = "kv", "pages", "index.", "boundary."


class BlockFormat:
    """Writes and reads the blocks of one fingerprint."""

    def __init__(self, fingerprint: Fingerprint) -> None:
        self._fingerprint = fingerprint

    def encode(self, block: Block) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata for safetensors."""
        pages = torch.tensor([checksum(page) for page in block.kv_SC2D.split(PAGE_TOKENS)], dtype=torch.int64)
        tensors = {_PAGES: pages}
        tensors |= {_INDEX + name: tensor for name, tensor in block.index.items()}
        tensors |= {_BOUNDARY + name: tensor for name, tensor in block.boundary.items()}
        header = {
            "key": block.key,
            "fingerprint": dataclasses.asdict(self._fingerprint),
            "checksums": {name: checksum(tensor) for name, tensor in tensors.items()},
        }
        return tensors | {_KV: block.kv_SC2D}, {"segcore": json.dumps(header, sort_keys=True)}

    def checksums(self, key: str, metadata: dict[str, str] | None) -> dict[str, int]:
        """Check a header against what it should say; the checksums in it. Raises BlockDamaged, BlockMismatch."""
        try:
            header = json.loads((metadata or {})["segcore"])
            found, fingerprint, sums = header["key"], dict(header["fingerprint"]), dict(header["checksums"])
        except (KeyError, TypeError, ValueError) as error:
            raise BlockDamaged(f"block {key} has no readable header") from error
        if wrong := self._fingerprint.differences(fingerprint):
            raise BlockMismatch(f"block {key} was made with another {', '.join(wrong)}", fields=",".join(wrong))
        if found != key:
            raise BlockMismatch(f"block {found} stands where block {key} should", fields="key")
        return sums

    def head(self, key: str, metadata: dict[str, str] | None, read: Callable[[str], Tensor]) -> BlockHead:
        """Index and boundary; `read` gives a tensor by its name."""
        index, boundary = {}, {}
        for name, expected in self.checksums(key, metadata).items():
            tensor = _verified(key, name, read(name), expected)
            if name.startswith(_INDEX):
                index[name.removeprefix(_INDEX)] = tensor
            elif name.startswith(_BOUNDARY):
                boundary[name.removeprefix(_BOUNDARY)] = tensor
        return BlockHead(index, boundary)

    def rows(
        self,
        key: str,
        metadata: dict[str, str] | None,
        read: Callable[[str], Tensor],
        read_kv: Callable[[slice], Tensor],
        rows_n: Tensor,
    ) -> Tensor:
        """Rows of the bulk, [n, C, 2, D]; `read_kv` gives some tokens of it. Reads and verifies whole pages."""
        expected = self.checksums(key, metadata).get(_PAGES)
        sums = _verified(key, _PAGES, read(_PAGES), expected)
        pages: dict[int, Tensor] = {}
        for page in torch.unique(rows_n // PAGE_TOKENS).tolist():
            tokens = slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
            pages[page] = _verified(key, f"page {page}", read_kv(tokens), int(sums[page]))
        return torch.stack([pages[row // PAGE_TOKENS][row % PAGE_TOKENS] for row in rows_n.tolist()])


def checksum(tensor: Tensor) -> int:
    """A CRC-32 over a tensor's dtype, shape and bytes."""
    kind = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, zlib.crc32(kind))


def _verified(key: str, name: str, tensor: Tensor, expected: int | None) -> Tensor:
    if checksum(tensor) != expected:
        raise BlockDamaged(f"block {key}: the checksum of {name} doesn't match")
    return tensor
