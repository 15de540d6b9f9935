"""Encryption at rest, with keys of each tenant's own: AES-256-GCM of the package `cryptography`.

    keys:
      acme: [6HZ1Jz0m2Yd0mcmtX6vjw3jzZk4o4uR1bqOaH1nL2Zs=]   # `openssl rand -base64 32` makes one
      "": [...]                                              # of a service without tenants

A tenant's first key encrypts; all of its keys decrypt. What is stored begins with which key it was, and with a salt:
each value has a key of its own, derived from the two by HKDF-SHA256, so its pieces may simply be numbered, and a part
of a long value is read without the rest. A piece is bound to its place, and to the name of the value that it is part
of.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from segcore.errors import BlockDamaged, BlockMismatch, ConfigError, FailedPrecondition, SessionLost
from services.config_file import read_config
from services.serving.record import ENCRYPTED

if TYPE_CHECKING:
    from segcore.pastkv.format import ReadRanges

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as missing:  # pragma: no cover
    raise ConfigError("encryption_keys needs the package cryptography: pip install segcore[serve]") from missing

PIECE_BYTES = 2**16
_ID_BYTES, _SALT_BYTES, _KEY_BYTES, _TAG_BYTES = 8, 16, 32, 16
_HEAD_BYTES = len(ENCRYPTED) + _ID_BYTES + _SALT_BYTES
_STORED_BYTES = PIECE_BYTES + _TAG_BYTES


def _key(text: str) -> bytes:
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != _KEY_BYTES:
        raise ValueError(f"a key is {_KEY_BYTES} random bytes in base64: openssl rand -base64 {_KEY_BYTES}")
    return key


Key = Annotated[str, AfterValidator(_key)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{0,64}$")]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    keys: dict[Name, Annotated[list[Key], Field(min_length=1)]] = Field(min_length=1)


class WrongKey(Exception):
    """A value isn't encrypted, or with a key that isn't known here."""


class Damaged(Exception):
    """A value isn't whole, or isn't the one that was asked for."""


class Keys:
    """The keys of all tenants; a `Cipher` of past KV."""

    def __init__(self, keys: dict[str, list[bytes]]) -> None:
        """keys: of each tenant, in bytes, the one that encrypts first. Raises ConfigError if two share one."""
        self._first = {tenant: (_derived(given[0], b"", b"id", _ID_BYTES), given[0]) for tenant, given in keys.items()}
        everyone = [key for given in keys.values() for key in given]
        if len(set(everyone)) < len(everyone):
            raise ConfigError("encryption_keys: the same key is there twice")
        self._by_id = {_derived(key, b"", b"id", _ID_BYTES): key for key in everyone}

    @classmethod
    def read(cls, path: Path) -> Keys:
        """The keys of a file. Raises ConfigError, which tells no key."""
        return cls(read_config(path, _File).keys)  # type: ignore[arg-type]  # bytes by now

    def check(self, tenant: str) -> None:
        if tenant not in self._first:
            raise FailedPrecondition(f"there is no encryption key for tenant {tenant!r}; add one to encryption_keys")

    def encrypt(self, tenant: str, key: str, parts: Sequence[memoryview]) -> list[memoryview]:
        return [memoryview(part) for part in self._pieces(tenant, f"block {key}", b"".join(parts))]

    def decrypt(self, key: str, read: ReadRanges) -> ReadRanges:
        def plain(ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
            try:
                return read_plain(ranges)
            except WrongKey as error:
                raise BlockMismatch(f"block {key} {error}", fields="encryption") from error
            except Damaged as error:
                raise BlockDamaged(f"block {key} {error}") from error

        read_plain = self._reader(f"block {key}", read)
        return plain

    def seal(self, tenant: str, name: str, value: bytes) -> bytes:
        """A value of a session, encrypted. Raises FailedPrecondition for a tenant without a key."""
        return b"".join(self._pieces(tenant, name, value))

    def unseal(self, name: str, stored: bytes) -> bytes:
        """The value again. Raises FailedPrecondition without the right key, SessionLost if it isn't whole."""
        try:
            read = self._reader(name, lambda ranges: [stored[start:stop] for start, stop in ranges])
            pieces = -(-max(len(stored) - _HEAD_BYTES, 0) // _STORED_BYTES)
            return read([(0, pieces * PIECE_BYTES)])[0]
        except WrongKey as error:
            raise FailedPrecondition(f"the session {error}") from error
        except Damaged as error:
            raise SessionLost(f"what was stored of the session {error}") from error

    def _pieces(self, tenant: str, name: str, data: bytes) -> list[bytes]:
        """All that is stored of a value, in order."""
        self.check(tenant)
        key_id, key = self._first[tenant]
        salt, view = os.urandom(_SALT_BYTES), memoryview(data)
        cipher = AESGCM(_derived(key, salt, b"value", _KEY_BYTES))
        starts = range(0, max(len(data), 1), PIECE_BYTES)
        pieces = [
            cipher.encrypt(_nonce(number), view[start : start + PIECE_BYTES], name.encode())
            for number, start in enumerate(starts)
        ]
        return [ENCRYPTED + key_id + salt, *pieces]

    def _reader(self, name: str, read: ReadRanges) -> ReadRanges:
        """What reads parts of a value, given what reads the stored one. Raises WrongKey, Damaged."""
        cipher: AESGCM | None = None

        def plain(ranges: Sequence[tuple[int, int]]) -> list[bytes]:
            nonlocal cipher
            firsts = [start // PIECE_BYTES for start, _ in ranges]
            wanted = [
                (_HEAD_BYTES + first * _STORED_BYTES, _HEAD_BYTES + -(-stop // PIECE_BYTES) * _STORED_BYTES)
                for first, (_, stop) in zip(firsts, ranges, strict=True)
            ]
            if cipher is None:
                head, *parts = read([(0, _HEAD_BYTES), *wanted])
                cipher = self._cipher(head)
            else:
                parts = list(read(wanted))
            found = []
            for first, (start, stop), part in zip(firsts, ranges, parts, strict=True):
                skipped = first * PIECE_BYTES
                found.append(_opened(cipher, name, first, part)[start - skipped : stop - skipped])
            return found

        return plain

    def _cipher(self, head: bytes) -> AESGCM:
        """What decrypts a value that begins so."""
        if not head.startswith(ENCRYPTED):
            raise WrongKey("isn't encrypted, and everything is here")
        key_id, salt = head[len(ENCRYPTED) : -_SALT_BYTES], head[-_SALT_BYTES:]
        if len(head) < _HEAD_BYTES:
            raise Damaged("ends too early")
        if key_id not in self._by_id:
            raise WrongKey(f"was encrypted with key {key_id.hex()}, which isn't in encryption_keys")
        return AESGCM(_derived(self._by_id[key_id], salt, b"value", _KEY_BYTES))


def _opened(cipher: AESGCM, name: str, first: int, stored: bytes) -> bytes:
    """The pieces from number `first` on, decrypted."""
    view, starts = memoryview(stored), range(0, len(stored), _STORED_BYTES)
    open_piece: Callable[[bytes, memoryview, bytes], bytes] = cipher.decrypt
    try:
        return b"".join(
            open_piece(_nonce(number), view[start : start + _STORED_BYTES], name.encode())
            for number, start in enumerate(starts, first)
        )
    except InvalidTag as error:
        raise Damaged("isn't what was encrypted") from error


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


def _derived(key: bytes, salt: bytes, purpose: bytes, size: int) -> bytes:
    return HKDF(SHA256(), size, salt, b"segcore " + purpose).derive(key)
