"""A block as bytes: a safetensors file, read in ranges, so that a few tokens of a block cost a few pages of it.

Its header says what it is, the key and every field of the fingerprint, and carries checksums: of itself, of every
tensor and, in the bulk, of every page of tokens. A reader trusts nothing that it hasn't checked. Files are read, never
mapped: what another process truncates, or a disk loses, is an error then, and not the end of the process.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from segcore.errors import BlockDamaged, BlockMismatch
from segcore.fingerprint import Fingerprint
from segcore.pastkv.base import Block, BlockHead

# A read is verified page by page.
PAGE_TOKENS = 16
# The first read: enough for the header of a segment of a few thousand tokens.
FIRST_READ_BYTES = 2**14
# No header of ours is longer; a damaged length must not make a reader allocate at random.
MAX_HEADER_BYTES = 2**24
_LENGTH_BYTES, _CRC_DIGITS = 8, 8
_START = b'{"__metadata__":{"crc32":"'
_KV, _INDEX, _BOUNDARY = "kv", "index.", "boundary."
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

# Gives the bytes at each [start, stop) of a stored block; fewer, or none, where it ends earlier.
ReadRanges = Callable[[Sequence[tuple[int, int]]], Sequence[bytes]]


class Cipher(Protocol):
    """Encrypts blocks where they are kept outside of memory. Methods may be called from any thread."""

    def check(self, tenant: str) -> None:
        """Raise FailedPrecondition for a tenant whose blocks can't be encrypted."""
        ...

    def encrypt(self, tenant: str, key: str, parts: Sequence[memoryview]) -> list[memoryview]:
        """A block's bytes as they are stored. Raises as `check` does."""
        ...

    def decrypt(self, key: str, read: ReadRanges) -> ReadRanges:
        """What reads a block's bytes, given what reads the stored ones.

        It raises BlockMismatch for what was encrypted with a key that isn't known here, or not at all, BlockDamaged for
        what isn't whole.
        """
        ...


class BlockFormat:
    """Writes and reads the blocks of one fingerprint; with a cipher, all of their bytes are encrypted."""

    def __init__(self, fingerprint: Fingerprint, cipher: Cipher | None = None) -> None:
        self._fingerprint, self._cipher = fingerprint, cipher

    def encode(self, block: Block) -> list[memoryview]:
        """The file, in pieces; the tensors' bytes aren't copied unless they are encrypted."""
        tensors = {_INDEX + name: tensor for name, tensor in block.index.items()}
        tensors |= {_BOUNDARY + name: tensor for name, tensor in block.boundary.items()}
        tensors[_KV] = block.kv_SC2D
        data = {name: _bytes(tensor) for name, tensor in tensors.items()}
        page_bytes = PAGE_TOKENS * len(data[_KV]) // max(len(block.kv_SC2D), 1)
        pages = [zlib.crc32(data[_KV][at : at + page_bytes]) for at in range(0, len(data[_KV]), page_bytes)]
        about: dict[str, object] = {
            "key": block.key,
            "fingerprint": dataclasses.asdict(self._fingerprint),
            "pages": pages,
            "checksums": {name: zlib.crc32(part) for name, part in data.items() if name != _KV},
        }
        entries: dict[str, object] = {}
        offset = 0
        for name, part in data.items():
            stop = offset + len(part)
            dtype, shape = _NAMES[tensors[name].dtype], list(tensors[name].shape)
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, stop]}
            offset = stop
        parts = [memoryview(_header(about, entries)), *data.values()]
        return parts if self._cipher is None else self._cipher.encrypt(block.tenant, block.key, parts)

    def head(self, key: str, read: ReadRanges, *, boundary: bool = True) -> BlockHead:
        """Index, and boundary if it is asked for. Raises BlockDamaged, BlockMismatch, and what `read` raises."""
        read = self._plain(key, read)
        header = self._open(key, read)
        names = [name for name in header.entries if name.startswith((_INDEX, _BOUNDARY) if boundary else _INDEX)]
        parts = read([header.range(name) for name in names])
        head = BlockHead({}, {})
        for name, part in zip(names, parts, strict=True):
            _verify(key, name, part, header.checksums.get(name))
            tensor = header.tensor(name, bytearray(part))
            if name.startswith(_INDEX):
                head.index[name.removeprefix(_INDEX)] = tensor
            else:
                head.boundary[name.removeprefix(_BOUNDARY)] = tensor
        return head

    def rows(self, key: str, read: ReadRanges, rows_n: Tensor) -> Tensor:
        """Rows of the bulk, [n, C, 2, D]. Reads and verifies whole pages. Raises as `head` does."""
        read = self._plain(key, read)
        header = self._open(key, read)
        (start, stop), tokens = header.range(_KV), header.entries[_KV]["shape"][0]
        page_bytes = PAGE_TOKENS * (stop - start) // tokens
        wanted, page_n = torch.unique(rows_n // PAGE_TOKENS, return_inverse=True)
        pages = wanted.tolist()
        parts = read([(start + p * page_bytes, min(start + (p + 1) * page_bytes, stop)) for p in pages])
        for page, part in zip(pages, parts, strict=True):
            _verify(key, f"page {page}", part, header.pages[page])
        kv_nC2D = header.tensor(_KV, bytearray().join(parts))
        return kv_nC2D[page_n * PAGE_TOKENS + rows_n % PAGE_TOKENS]

    def _plain(self, key: str, read: ReadRanges) -> ReadRanges:
        return read if self._cipher is None else self._cipher.decrypt(key, read)

    def _open(self, key: str, read: ReadRanges) -> _Header:
        """The header, checked against what it should say."""
        text = _header_text(key, read)
        try:
            entries = json.loads(text)
            about = json.loads(entries.pop("__metadata__")["segcore"])
            if wrong := self._fingerprint.differences(about["fingerprint"]):
                raise BlockMismatch(f"block {key} was made with another {', '.join(wrong)}", fields=",".join(wrong))
            if about["key"] != key:
                raise BlockMismatch(f"block {about['key']} stands where block {key} should", fields="key")
            return _Header(_LENGTH_BYTES + len(text), entries, about["pages"], about["checksums"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BlockDamaged(f"block {key} has no header of ours") from error


@dataclasses.dataclass(frozen=True)
class _Header:
    """data: where the tensors' bytes begin. entries: each tensor's dtype, shape and range, by name."""

    data: int
    entries: dict[str, Any]
    pages: list[int]
    checksums: dict[str, int]

    def range(self, name: str) -> tuple[int, int]:
        start, stop = self.entries[name]["data_offsets"]
        return self.data + start, self.data + stop

    def tensor(self, name: str, data: bytearray) -> Tensor:
        """The tensor of these bytes; its first dimension may be shorter than the whole tensor's."""
        dtype, shape = _DTYPES[self.entries[name]["dtype"]], self.entries[name]["shape"]
        if not data:
            return torch.empty([0, *shape[1:]] if name == _KV else shape, dtype=dtype)
        flat = torch.frombuffer(data, dtype=dtype)
        return flat.view(-1, *shape[1:]) if name == _KV else flat.view(shape)


def checksum(tensor: Tensor) -> int:
    """A CRC-32 over a tensor's dtype, shape and bytes."""
    kind = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return zlib.crc32(_bytes(tensor), zlib.crc32(kind))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _header(about: dict[str, object], entries: dict[str, object]) -> bytes:
    """The header with its length; its checksum stands first and covers all that follows."""
    metadata = {"crc32": "0" * _CRC_DIGITS, "segcore": json.dumps(about, sort_keys=True)}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    rest = text[len(_START) + _CRC_DIGITS :]
    assert len(text) <= MAX_HEADER_BYTES
    return len(text).to_bytes(_LENGTH_BYTES, "little") + _START + b"%08x" % zlib.crc32(rest) + rest


def _header_text(key: str, read: ReadRanges) -> bytes:
    """The header, as it was written. Raises BlockDamaged."""
    (first,) = read([(0, FIRST_READ_BYTES)])
    length = int.from_bytes(first[:_LENGTH_BYTES], "little")
    stop = _LENGTH_BYTES + length
    if length <= MAX_HEADER_BYTES:
        text = first[_LENGTH_BYTES:stop]
        if stop > FIRST_READ_BYTES:
            text += read([(FIRST_READ_BYTES, stop)])[0]
        start, crc = text[: len(_START)], text[len(_START) : len(_START) + _CRC_DIGITS]
        if len(text) == length and start == _START and crc == b"%08x" % zlib.crc32(text[len(_START) + _CRC_DIGITS :]):
            return text
    raise BlockDamaged(f"block {key}: the header's checksum doesn't match")


def _verify(key: str, name: str, data: bytes, expected: int | None) -> None:
    if zlib.crc32(data) != expected:
        raise BlockDamaged(f"block {key}: the checksum of {name} doesn't match")
