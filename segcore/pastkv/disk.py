"""Blocks on local disk: one safetensors file each, complete or absent, with a checksum for every page of tokens."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from segcore.errors import BlockDamaged, BlockMissing, PastKVError, StorageFull
from segcore.pastkv.base import BlockKey

# A read is verified page by page, so that a few tokens of a block cost a few pages, not the block.
PAGE_TOKENS = 16


class DiskTier:
    """A `Tier` in a folder of this process's own below `directory`.

    The folder is locked while the process lives; folders whose process has ended are removed when a tier starts.
    """

    def __init__(self, directory: Path, budget_bytes: int | None) -> None:
        self.used_bytes = 0
        self._budget_bytes = budget_bytes
        self._sizes: dict[BlockKey, int] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with open(directory / "start.lock", "w") as starting:
                # One tier starts at a time: else another could take a folder for abandoned before it is locked.
                fcntl.flock(starting, fcntl.LOCK_EX)
                _remove_abandoned(directory)
                self.folder = directory / f"engine-{uuid.uuid4().hex}"
                self.folder.mkdir()
                self._lock = open(self.folder / "lock", "w")  # noqa: SIM115 - held open for the tier's life
                fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise PastKVError(f"past KV can't be kept in {directory}: {error.strerror}") from error

    def put(self, key: BlockKey, block_SC2D: Tensor) -> None:
        if self._budget_bytes is not None and self.used_bytes + block_SC2D.nbytes > self._budget_bytes:
            raise StorageFull(
                f"the disk tier is full ({self.used_bytes} of {self._budget_bytes} bytes); delete sessions or raise"
                " disk_bytes"
            )
        path = self._path(key)
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(exist_ok=True)
            save_file({"kv": block_SC2D, "crc32": _page_checksums(block_SC2D)}, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            raise (StorageFull if full else PastKVError)(f"can't write past KV: {error}") from error
        self._sizes[key] = block_SC2D.nbytes
        self.used_bytes += block_SC2D.nbytes

    def rows(self, key: BlockKey, rows_n: Tensor) -> Tensor:
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                block, checksums = file.get_slice("kv"), file.get_tensor("crc32")
                pages: dict[int, Tensor] = {}
                for page in torch.unique(rows_n // PAGE_TOKENS).tolist():
                    tokens = block[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS]
                    if _crc32(tokens) != checksums[page]:
                        raise BlockDamaged(f"block {tuple(key)}, page {page}: checksum mismatch on disk")
                    pages[page] = tokens
        except FileNotFoundError as error:
            raise BlockMissing(f"block {tuple(key)} isn't on disk") from error
        except (OSError, SafetensorError) as error:
            raise BlockDamaged(f"block {tuple(key)} can't be read: {error}") from error
        return torch.stack([pages[row // PAGE_TOKENS][row % PAGE_TOKENS] for row in rows_n.tolist()])

    def delete(self, key: BlockKey) -> None:
        self.used_bytes -= self._sizes.pop(key, 0)
        self._path(key).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder and all it holds."""
        self._lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, key: BlockKey) -> Path:
        return self.folder / f"{key.stream:08d}" / f"{key.segment:08d}.safetensors"


def _page_checksums(block_SC2D: Tensor) -> Tensor:
    return torch.tensor([_crc32(page) for page in block_SC2D.split(PAGE_TOKENS)], dtype=torch.int64)


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, zlib.crc32(str(tensor.dtype).encode()))


def _remove_abandoned(directory: Path) -> None:
    for lock in directory.glob("engine-*/lock"):
        try:
            with open(lock) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its process lives
        shutil.rmtree(lock.parent, ignore_errors=True)
