"""How many engine replicas a load needs, for Serve's autoscaler.

Open requests, by which Serve scales otherwise, say little here: an upload is one request for as long as its document is
in the making, and most of that time its engine waits for it. What counts is what engines have to do.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

# Of the sessions that replicas can hold, the share at which there should be more replicas: hashing spreads sessions
# unevenly, and a replica that is full refuses new ones.
FULL = 0.8
# What the policy goes by, of `EngineStats`.
FIGURES = ("working_sessions", "queued_tokens", "sessions")


class LoadPolicy:
    """Serve's custom policy: calls give the number of replicas that the load would keep just busy.

    Serve hands over the FIGURES of `EngineDeployment.record_autoscaling_stats`, averaged over its look-back time, and
    applies its delays and bounds to what comes back. Each figure asks for replicas of its own accord, and the highest
    number counts: sessions at work share `slots`, tokens that wait are served at `waiting_tokens` a replica, and open
    sessions find room. Replicas that have yet to report are taken to be idle.
    """

    def __init__(self, *, slots: int, waiting_tokens: int, max_sessions: int) -> None:
        capacities = (slots, waiting_tokens, FULL * max_sessions)
        self._capacity = dict(zip(FIGURES, capacities, strict=True))

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Replicas wanted, which may be a fraction, and the policy's state, of which there is none."""
        figures = context.aggregated_metrics or {}
        reported = {name: sum(figures[name].values()) for name in self._capacity if name in figures}
        if not reported:
            return context.target_num_replicas, {}
        return max(total / self._capacity[name] for name, total in reported.items()), {}
