"""Policies by name. Each is one small file on the interface of `base`."""

from segcore.config import SegmentConfig
from segcore.errors import ConfigError
from segcore.model import ModelSpec, Rope
from segcore.policies.base import Policy
from segcore.policies.full import FullPolicy
from segcore.policies.segmented import SegmentedPolicy

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (FullPolicy, SegmentedPolicy)}


def make_policy(config: SegmentConfig, spec: ModelSpec, rope: Rope) -> Policy:
    """The policy that `config.policy` names; raises ConfigError for an unknown name or cells outside the model."""
    if config.policy not in POLICIES:
        raise ConfigError(f"unknown policy {config.policy!r}; known: {', '.join(sorted(POLICIES))}")
    return POLICIES[config.policy](config, spec, rope)


__all__ = ["POLICIES", "Policy", "make_policy"]
