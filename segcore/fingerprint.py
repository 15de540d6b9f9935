"""What past KV depends on besides its tokens. Two engines may share blocks only if every field is equal."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor, nn

from segcore.config import SegmentConfig

# Raised whenever the meaning of a block's bytes changes, or what they are made from: which tokens a segment has seen.
LAYOUT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """model: its name. weights, tokenizer: hashes. adapter: its id, "" for none. dtype: of keys and values.
    layout: version of the block format. segment: the policy and its options, as JSON."""

    model: str = ""
    weights: str = ""
    tokenizer: str = ""
    adapter: str = ""
    dtype: str = ""
    layout: int = LAYOUT_VERSION
    segment: str = ""

    @property
    def digest(self) -> str:
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return blake2b(text.encode(), digest_size=20).hexdigest()

    def differences(self, other: dict[str, object]) -> list[str]:
        """The names of the fields in which `other`, as `dataclasses.asdict` gives it, differs."""
        mine = dataclasses.asdict(self)
        return sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))


def segment_json(config: SegmentConfig) -> str:
    """A policy and its options as one line of JSON."""
    return json.dumps({"policy": config.policy, **dataclasses.asdict(config)}, sort_keys=True)


def weights_digest(*modules: nn.Module) -> str:
    """A hash of parameters and buffers, a model's for example: names, dtypes, shapes and every byte."""
    tensors = sorted((name, tensor) for module in modules for name, tensor in module.state_dict().items())
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        digests = pool.map(_tensor_digest, (tensor for _, tensor in tensors))
    whole = blake2b(digest_size=20)
    for (name, tensor), digest in zip(tensors, digests, strict=True):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + digest)
    return whole.hexdigest()


def _tensor_digest(tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return blake2b(data.numpy().data, digest_size=20).digest()
