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
from segcore.retrieval.query_maps import QueryMaps

POLICIES: dict[str, type[Policy[Any]]] = {
    "full": FullPolicy,
    "streaming": StreamingPolicy,
    "segmented": SegmentedPolicy,
    "longgen": LongGenPolicy,
    "lagkv": LagKVPolicy,
    "ltri": LtriPolicy,
    "duo": DuoPolicy,
}


def make_policy(config: SegmentConfig, spec: ModelSpec, rope: Rope, query_maps: QueryMaps | None = None) -> Policy[Any]:
    """The policy that a configuration names. query_maps: for policies whose selectors have learned what to look for.

    Raises ConfigError for cells outside the model, or selectors other than those that learned.
    """
    policy = POLICIES[config.policy](config, spec, rope)
    if query_maps is not None and isinstance(policy, SegmentedPolicy):
        policy.look_by(query_maps)
    return policy


__all__ = ["POLICIES", "Policy", "make_policy"]
