"""A state as a flat set of tensors, and a whole session as bytes: safetensors, no pickle.

A state's tensors hold live rows alone, so a short stream's snapshot is small. A session's bytes carry its journal
too: if the rest is damaged, the journal brings it back.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from segcore.errors import BlockDamaged, BlockMismatch
from segcore.fingerprint import Fingerprint
from segcore.pastkv.format import checksum
from segcore.pastkv.journal import Journal
from segcore.policies import Policy
from segcore.state import State, Window

_HOST = torch.device("cpu")
_FIELDS = ("k_HND", "rotated_HND", "v_HND")


def pack(state: State) -> dict[str, Tensor]:
    """The state's live tensors, copied to host memory."""
    tensors = {
        "counts": torch.tensor([state.length, state.filled, state.events]),
        "retrieved": _copy(state.retrieved_CR, _HOST),
    }
    tensors |= {f"queries.{i}": _copy(q, _HOST) for i, q in enumerate(state.queries)}
    for layer, windows in enumerate(state.layers):
        for i, window in enumerate(windows):
            stop, name = window.base + state.filled, f"window.{layer}.{i}"
            tensors[f"{name}.rows"] = torch.tensor([window.start, window.base, window.position, window.k_HND.shape[1]])
            for field in _FIELDS:
                tensors[f"{name}.{field}"] = _copy(getattr(window, field)[:, window.start : stop], _HOST)
    return tensors


def unpack(tensors: dict[str, Tensor], policy: Policy[Any]) -> State:
    """The state again, on the policy's device."""
    state, device = policy.begin(), policy.spec.device
    state.length, state.filled, state.events = tensors["counts"].tolist()
    state.retrieved_CR = tensors["retrieved"].clone()
    state.queries = [_copy(tensors[f"queries.{i}"], device) for i in range(len(state.queries))]
    for layer, windows in enumerate(state.layers):
        for i, window in enumerate(windows):
            name = f"window.{layer}.{i}"
            _restore(window, tensors[f"{name}.rows"].tolist(), [tensors[f"{name}.{field}"] for field in _FIELDS])
    return state


def counted(tensors: dict[str, Tensor]) -> State:
    """What is to be known of a packed state while it is parked: how far it has come."""
    length, filled, events = tensors["counts"].tolist()
    return State([], length=length, filled=filled, events=events)


def _restore(window: Window, rows: list[int], live: list[Tensor]) -> None:
    window.start, window.base, window.position, held = rows
    for field in _FIELDS:
        empty = getattr(window, field)
        if empty.shape[1] != held:  # the window had grown
            setattr(window, field, empty.new_zeros(empty.shape[0], held, empty.shape[2]))
    window.write(window.start, *live)


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, copy=True).contiguous()


@dataclasses.dataclass
class Snapshot:
    """A session at rest: all it takes to continue it elsewhere.

    root: the key its blocks begin from, which tells tenant and fingerprint. keys: of its blocks. marks: positions of
    turn marks that wait. tensors: the packed state, and "logits" of the last token if there is one; None if they were
    damaged, and the journal must be run again.
    """

    root: str
    journal: Journal
    keys: tuple[str, ...]
    pending: deque[int]
    marks: tuple[int, ...]
    tensors: dict[str, Tensor] | None

    def to_bytes(self, fingerprint: Fingerprint) -> bytes:
        tensors = {f"state.{name}": tensor for name, tensor in (self.tensors or {}).items()}
        tensors |= {
            "journal.tokens": torch.tensor(self.journal.tokens.tolist(), dtype=torch.int32),
            "journal.events": torch.tensor(self.journal.events.tolist(), dtype=torch.int64),
            "pending": torch.tensor(list(self.pending), dtype=torch.int32),
        }
        header = {
            "root": self.root,
            "keys": self.keys,
            "marks": self.marks,
            "fingerprint": dataclasses.asdict(fingerprint),
            "checksums": {name: checksum(tensor) for name, tensor in tensors.items()},
        }
        text = json.dumps(header, sort_keys=True)
        return save(tensors, {"segcore": f"{_checksum(text)} {text}"})

    @classmethod
    def from_bytes(cls, data: bytes, fingerprint: Fingerprint) -> Snapshot:
        """Read and verify. Raises BlockMismatch for another model or configuration, BlockDamaged if even the journal
        can't be trusted."""
        try:
            length = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + length])["__metadata__"]
            expected, text = metadata["segcore"].split(" ", 1)
            tensors = load(data)
            if _checksum(text) != int(expected):
                raise ValueError("its header's checksum doesn't match")
            header = json.loads(text)
        except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
            raise BlockDamaged(f"the snapshot can't be read: {error}") from error
        if wrong := fingerprint.differences(header["fingerprint"]):
            raise BlockMismatch(f"the snapshot was made with another {', '.join(wrong)}", fields=",".join(wrong))
        with ThreadPoolExecutor() as executor:
            sums = zip(tensors, executor.map(checksum, tensors.values()), strict=True)
            whole = {name for name, found in sums if found == header["checksums"].get(name)}
        if not {"journal.tokens", "journal.events", "pending"} <= whole:
            raise BlockDamaged("the snapshot's tokens are damaged: their checksum doesn't match")
        state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
        intact = whole == set(header["checksums"])
        return cls(
            root=header["root"],
            journal=Journal(tensors["journal.tokens"].tolist(), tensors["journal.events"].tolist()),
            keys=tuple(header["keys"]),
            pending=deque(tensors["pending"].tolist()),
            marks=tuple(header["marks"]),
            tensors=state if intact and state else None,
        )


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())
