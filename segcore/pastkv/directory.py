"""Blocks in a folder: one file each, complete or absent. Local disk, or a folder that replicas share.

A file is written under a name of its own and renamed when whole, which is atomic for every reader. Nothing is synced:
after a power failure a renamed file can be short or empty, and its checksums say so; the tokens bring it back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from segcore.errors import BlockDamaged, BlockMissing, StorageFull, TierUnavailable
from segcore.pastkv.base import Block, BlockHead
from segcore.pastkv.format import BlockFormat, ReadRanges

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# A shared folder is listed at most so often while its budget holds: others write there, too.
RESCAN_S = 60.0
# How exact the time of a block's last use is.
TOUCH_S = 60.0
# A partial file that hasn't grown for so long was left by a process that died.
STALE_S = 3600.0


class DirectoryTier:
    """A `Tier` in a folder, within `budget_bytes` (None: as much as the disk holds).

    What this process put counts against the budget, as bytes of files.
    """

    def __init__(self, name: str, folder: Path, blocks: BlockFormat, budget_bytes: int | None) -> None:
        self.name, self.folder, self.budget_bytes = name, folder, budget_bytes
        self._format = blocks
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._used_bytes = 0
        self._lock = threading.Lock()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._make_folder()
        except OSError as error:
            raise TierUnavailable(f"past KV can't be kept in {folder}: {error.strerror}") from error

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def keys(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._sizes)

    def put(self, block: Block, spare: Iterable[str] = ()) -> None:
        if self.holds(block.key):
            return
        spare, parts = iter(spare), self._format.encode(block)
        size = sum(map(len, parts))
        self._make_room(size, spare)
        for last_try in (False, True):
            try:
                self._write(self._path(block.key), parts)
                break
            except OSError as error:
                if last_try or not self._helped(error, size, spare):
                    full = error.errno in FULL
                    raise (StorageFull if full else TierUnavailable)(f"can't write past KV: {error}") from error
        self._count(block.key, size)

    def rows(self, key: str, rows_n: Tensor) -> Tensor:
        with self._open(key) as read:
            return self._format.rows(key, read, rows_n)

    def head(self, key: str, *, boundary: bool = True) -> BlockHead:
        with self._open(key) as read:
            return self._format.head(key, read, boundary=boundary)

    def holds(self, key: str) -> bool:
        try:
            self._path(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise TierUnavailable(f"the {self.name} tier can't be read: {error}") from error
        return True

    def delete(self, key: str) -> None:
        with self._lock:
            self._forget(key)
        with suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def close(self) -> None:
        """Files stay: others use them."""

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _make_folder(self) -> None:
        self.folder.mkdir(exist_ok=True)

    def _count(self, key: str, size: int) -> None:
        with self._lock:
            self._forget(key)
            self._sizes[key] = size
            self._used_bytes += size

    def _forget(self, key: str) -> None:
        """Stop counting a block; the lock is held."""
        self._used_bytes -= self._sizes.pop(key, 0)

    def _make_room(self, needed_bytes: int, spare: Iterator[str]) -> None:
        """Room within the budget. Raises StorageFull."""
        if self.budget_bytes is None:
            return
        if needed_bytes <= self.budget_bytes:
            while self.used_bytes + needed_bytes > self.budget_bytes and (key := next(spare, None)) is not None:
                self.delete(key)
        if self.used_bytes + needed_bytes > self.budget_bytes:
            raise StorageFull(
                f"the {self.name} tier is full ({self.used_bytes} of {self.budget_bytes} bytes); delete sessions or"
                f" raise {self.name}_bytes"
            )

    def _helped(self, error: OSError, needed_bytes: int, spare: Iterator[str]) -> bool:
        """Do something about a failed write; whether trying again can help."""
        if error.errno in FULL:  # others fill this disk, or there is no budget
            freed = self.used_bytes
            while freed - self.used_bytes < needed_bytes and (key := next(spare, None)) is not None:
                self.delete(key)
            return self.used_bytes < freed
        if error.errno == errno.ENOENT:  # somebody removed the folder
            with suppress(OSError):
                self._make_folder()
                with self._lock:
                    for key in [key for key in self._sizes if not self._path(key).exists()]:
                        self._forget(key)
                return True
        return False

    def _write(self, path: Path, parts: Sequence[memoryview]) -> None:
        """Make a file at once. Raises OSError; then nothing is left."""
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.partial")
        try:
            with open(partial, "wb", buffering=0) as file:
                for part in parts:
                    while part:
                        part = part[file.write(part) :]
            os.replace(partial, path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    @contextmanager
    def _open(self, key: str) -> Iterator[ReadRanges]:
        try:
            with open(self._path(key), "rb", buffering=0) as file:
                self._used(key, file.fileno())
                yield lambda ranges: [os.pread(file.fileno(), stop - start, start) for start, stop in ranges]
        except (FileNotFoundError, NotADirectoryError) as error:
            with self._lock:
                self._forget(key)
            raise BlockMissing(f"block {key} isn't in the {self.name} tier") from error
        except OSError as error:
            if error.errno == errno.EIO:  # this block is lost; the disk may still hold others
                raise BlockDamaged(f"block {key} can't be read: {error}") from error
            raise TierUnavailable(f"the {self.name} tier can't be read: {error}") from error

    def _used(self, key: str, file: int) -> None:
        """Note that a block is being used."""
        with self._lock:
            if key in self._sizes:
                self._sizes.move_to_end(key)


class LocalDisk(DirectoryTier):
    """A tier in a folder of this process's own below `directory`, gone when the process is.

    The folder is locked while the process lives; folders whose process has ended are removed when a tier starts. Only
    its owner can read it.
    """

    def __init__(self, directory: Path, blocks: BlockFormat, budget_bytes: int | None) -> None:
        self._held: list[int] = []
        super().__init__("disk", directory / f"engine-{uuid.uuid4().hex}", blocks, budget_bytes)

    def close(self) -> None:
        """Remove the folder and all it holds."""
        shutil.rmtree(self.folder, ignore_errors=True)
        while self._held:
            os.close(self._held.pop())

    def _make_folder(self) -> None:
        directory = self.folder.parent
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / "start.lock", "w") as starting:
            # One folder is made at a time: else another process could take it for abandoned before it is locked.
            fcntl.flock(starting, fcntl.LOCK_EX)
            _remove_abandoned(directory)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDONLY, 0o600)
            self._held.append(lock)
            with suppress(BlockingIOError):  # ours from before
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_abandoned(directory: Path) -> None:
    for lock in directory.glob("engine-*/lock"):
        try:
            with open(lock) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its process lives
        shutil.rmtree(lock.parent, ignore_errors=True)


class SharedDirectory(DirectoryTier):
    """A tier in a folder that other processes and machines use too, a subfolder for each fingerprint.

    The budget is for all fingerprints together. Over it, the blocks that nobody has used for longest are removed,
    whoever put them there: a session that still needs one runs its tokens again. What others write is noticed after
    `RESCAN_S`; until then several writers together can be over budget by what they write meanwhile.
    """

    def __init__(self, directory: Path, digest: str, blocks: BlockFormat, budget_bytes: int | None) -> None:
        self._root = directory
        # Time of last use, size and path of what the last scan found and no sweep has removed since.
        self._oldest: deque[tuple[float, int, str]] = deque()
        self._found_bytes, self._scanned_at = 0, float("-inf")
        super().__init__("shared", directory / digest, blocks, budget_bytes)
        self._scan()

    @property
    def used_bytes(self) -> int:
        """Of all files, as far as known."""
        return self._found_bytes

    def put(self, block: Block, spare: Iterable[str] = ()) -> None:
        """`spare` has no say here: others may need what this process doesn't."""
        if self.holds(block.key):
            with suppress(OSError):
                os.utime(self._path(block.key))
            return
        super().put(block)

    def delete(self, key: str) -> None:
        with suppress(OSError), self._lock:
            self._found_bytes -= self._path(key).stat().st_size
        super().delete(key)

    def _make_room(self, needed_bytes: int, spare: Iterator[str]) -> None:
        if self.budget_bytes is None or needed_bytes > self.budget_bytes:
            super()._make_room(needed_bytes, spare)
            return
        if time.monotonic() - self._scanned_at > RESCAN_S:
            self._scan()
        if self.used_bytes + needed_bytes > self.budget_bytes and not self._sweep(self.budget_bytes - needed_bytes):
            self._scan()  # what was found before is gone, or has been used since
            self._sweep(self.budget_bytes - needed_bytes)
        super()._make_room(needed_bytes, spare)

    def _count(self, key: str, size: int) -> None:
        super()._count(key, size)
        with self._lock:
            self._found_bytes += size

    def _helped(self, error: OSError, needed_bytes: int, spare: Iterator[str]) -> bool:
        if error.errno not in FULL:
            return super()._helped(error, needed_bytes, spare)
        self._scan()
        found = self.used_bytes
        self._sweep(max(found - needed_bytes, 0))
        return self.used_bytes < found

    def _used(self, key: str, file: int) -> None:
        super()._used(key, file)
        if time.time() - os.fstat(file).st_mtime > TOUCH_S:
            with suppress(OSError):
                os.utime(file)

    def _scan(self) -> None:
        """Find all files, and how long they haven't been used; remove what killed processes left."""
        found = []
        for folder, _, names in os.walk(self._root):
            for name in names:
                path = os.path.join(folder, name)
                with suppress(OSError):  # another process may remove it meanwhile
                    stat = os.stat(path)
                    if name.endswith(".safetensors"):
                        found.append((stat.st_mtime, stat.st_size, path))
                    elif name.endswith(".partial") and time.time() - stat.st_mtime > STALE_S:
                        os.unlink(path)
        self._oldest = deque(sorted(found))
        with self._lock:
            self._found_bytes, self._scanned_at = sum(size for _, size, _ in found), time.monotonic()

    def _sweep(self, allowed_bytes: int) -> bool:
        """Remove what hasn't been used for longest, until so many bytes are left; whether that was possible."""
        while self._found_bytes > allowed_bytes and self._oldest:
            used_at, size, path = self._oldest.popleft()
            try:
                if os.stat(path).st_mtime != used_at:
                    continue  # used since it was found
                os.unlink(path)
            except FileNotFoundError:
                pass  # another process was first
            except OSError:
                continue
            with self._lock:
                self._found_bytes -= size
        return self._found_bytes <= allowed_bytes
