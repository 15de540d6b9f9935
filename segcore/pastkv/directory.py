"""Blocks in a folder: one safetensors file each, complete or absent. Local disk, or a folder that replicas share."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from segcore.errors import BlockDamaged, BlockMissing, StorageFull, TierUnavailable
from segcore.pastkv.base import Block, BlockHead
from segcore.pastkv.format import BlockFormat


class DirectoryTier:
    """A `Tier` in a folder, within `budget_bytes` (None: as much as the disk holds).

    What this process put counts against the budget. Writes go to a file of their own that is renamed when whole.
    """

    def __init__(self, name: str, folder: Path, blocks: BlockFormat, budget_bytes: int | None) -> None:
        self.name, self.folder, self.budget_bytes = name, folder, budget_bytes
        self._format = blocks
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TierUnavailable(f"past KV can't be kept in {folder}: {error.strerror}") from error

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return sum(self._sizes.values())

    @property
    def keys(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._sizes)

    def put(self, block: Block) -> None:
        path = self._path(block.key)
        if self.holds(block.key):
            return
        if self.budget_bytes is not None and self.used_bytes + block.nbytes > self.budget_bytes:
            raise StorageFull(
                f"the {self.name} tier is full ({self.used_bytes} of {self.budget_bytes} bytes); delete sessions or"
                f" raise {self.name}_bytes"
            )
        tensors, metadata = self._format.encode(block)
        partial = path.with_name(f"{block.key}.{uuid.uuid4().hex}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            save_file(tensors, partial, metadata)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            raise (StorageFull if full else TierUnavailable)(f"can't write past KV: {error}") from error
        with self._lock:
            self._sizes[block.key] = block.nbytes

    def rows(self, key: str, rows_n: Tensor) -> Tensor:
        with self._open(key) as file:
            kv = file.get_slice("kv")
            return self._format.rows(key, file.metadata(), file.get_tensor, kv.__getitem__, rows_n)

    def head(self, key: str) -> BlockHead:
        with self._open(key) as file:
            return self._format.head(key, file.metadata(), file.get_tensor)

    def holds(self, key: str) -> bool:
        return self._path(key).exists()

    def delete(self, key: str) -> None:
        with self._lock:
            self._sizes.pop(key, None)
        with suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def evict(self, spare: Iterable[str], needed_bytes: int) -> None:
        for key in spare:
            if self.budget_bytes is None or self.used_bytes + needed_bytes <= self.budget_bytes:
                return
            self.delete(key)

    def close(self) -> None:
        """Shared blocks stay."""

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    @contextmanager
    def _open(self, key: str) -> Iterator[Any]:
        try:
            with safe_open(self._path(key), framework="pt") as file:
                yield file
        except FileNotFoundError as error:
            raise BlockMissing(f"block {key} isn't in the {self.name} tier") from error
        except OSError as error:
            raise TierUnavailable(f"the {self.name} tier can't be read: {error}") from error
        except (SafetensorError, ValueError, RuntimeError, IndexError) as error:
            raise BlockDamaged(f"block {key} can't be read: {error}") from error


class LocalDisk(DirectoryTier):
    """A tier in a folder of this process's own below `directory`, gone when the process is.

    The folder is locked while the process lives; folders whose process has ended are removed when a tier starts.
    """

    def __init__(self, directory: Path, blocks: BlockFormat, budget_bytes: int | None) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with open(directory / "start.lock", "w") as starting:
                # One tier starts at a time: else another could take a folder for abandoned before it is locked.
                fcntl.flock(starting, fcntl.LOCK_EX)
                _remove_abandoned(directory)
                super().__init__("disk", directory / f"engine-{uuid.uuid4().hex}", blocks, budget_bytes)
                self._held = open(self.folder / "lock", "w")  # noqa: SIM115 - held open for the tier's life
                fcntl.flock(self._held, fcntl.LOCK_EX)
        except OSError as error:
            raise TierUnavailable(f"past KV can't be kept in {directory}: {error.strerror}") from error

    def close(self) -> None:
        """Remove the folder and all it holds."""
        self._held.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class SharedDirectory(DirectoryTier):
    """A tier in a folder that other processes and machines use too, a subfolder for each fingerprint.

    Over budget, the blocks that nobody has used for longest are removed, whoever put them there: a session that still
    needs one runs its tokens again.
    """

    def __init__(self, directory: Path, digest: str, blocks: BlockFormat, budget_bytes: int | None) -> None:
        super().__init__("shared", directory / digest, blocks, budget_bytes)

    def put(self, block: Block) -> None:
        if self.holds(block.key):
            self._touch(block.key)
        elif self.budget_bytes is None:
            super().put(block)
        else:
            self._sweep(self.budget_bytes - block.nbytes)
            super().put(block)

    @property
    def used_bytes(self) -> int:
        return sum(size for _, size, _ in self._files())

    def rows(self, key: str, rows_n: Tensor) -> Tensor:
        rows = super().rows(key, rows_n)
        self._touch(key)
        return rows

    def evict(self, spare: Iterable[str], needed_bytes: int) -> None:
        """Nothing: others may need what this process doesn't; `put` makes room by age."""

    def _touch(self, key: str) -> None:
        with suppress(OSError):
            os.utime(self._path(key))

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size and path of every block."""
        found = []
        for path in self.folder.glob("*/*.safetensors"):
            with suppress(OSError):  # another process may remove it meanwhile
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
        return found

    def _sweep(self, allowed_bytes: int) -> None:
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        for _, size, path in files:
            if used <= allowed_bytes:
                return
            path.unlink(missing_ok=True)
            used -= size


def _remove_abandoned(directory: Path) -> None:
    for lock in directory.glob("engine-*/lock"):
        try:
            with open(lock) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its process lives
        shutil.rmtree(lock.parent, ignore_errors=True)
