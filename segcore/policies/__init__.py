"""Policies by name. Each is one small file on the interface of `base`."""

from typing import Any

from segcore.config import SegmentConfig
from segcore.model import ModelSpec, Rope
from segcore.policies.base import Policy
from segcore.policies.duo import DuoPolicy
from segcore.policies.full import FullPolicy
from segcore.policies.lagkv import LagKVPolicy
from segcore.policies.longgen import LongGenPolicy
from segcore.policies.ltri import LtriPolicy
from segcore.policies.segmented import SegmentedPolicy
from segcore.policies.streaming import StreamingPolicy

POLICIES: dict[str, type[Policy[Any]]] = {
    "full": FullPolicy,
    "streaming": StreamingPolicy,
    "segmented": SegmentedPolicy,
    "longgen": LongGenPolicy,
    "lagkv": LagKVPolicy,
    "ltri": LtriPolicy,
    "duo": DuoPolicy,
}


def make_policy(config: SegmentConfig, spec: ModelSpec, rope: Rope) -> Policy[Any]:
    """The policy that a configuration names. Raises ConfigError for cells outside the model."""
    return POLICIES[config.policy](config, spec, rope)


__all__ = ["POLICIES", "Policy", "make_policy"]
