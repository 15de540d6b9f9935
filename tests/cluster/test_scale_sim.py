"""The simulation of many replicas: its ring is Serve's, and its queues lose nobody."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from benchmarks.scale_sim import Load, Ring, Simulation, Site


def test_sessions_go_where_serve_sends_them():
    router = SimpleNamespace(_num_virtual_nodes=100, _deployment_id="x")
    replicas = [ReplicaID(f"r{i}", DeploymentID("engine", "segcore")) for i in range(7)]
    ConsistentHashRouter._rebuild_ring(router, frozenset(replicas))
    ring = Ring()
    for replica in replicas[:4]:
        ring.add(replica.unique_id)
    ring.add("gone")
    for replica in replicas[4:]:
        ring.add(replica.unique_id)
    ring.remove("gone")
    for i in range(300):
        ranked = ConsistentHashRouter._lookup_ranked_replicas(
            SimpleNamespace(**vars(router), _num_fallback_replicas=0), f"session-{i}"
        )
        assert ring.find(f"session-{i}") == ranked[0].unique_id


def outcome(site: Site, **load: float):
    settings = {"sessions": 40, "document_tokens": 8192, "questions": 5, "pause_s": 20, "hours": 0.5} | load
    simulation = Simulation(site, Load(**settings))  # type: ignore[arg-type]
    return simulation, simulation.run()


QUIET = Site(replicas=4, mtbf_s=1e12)


def test_alone_a_question_takes_its_prefill_and_one_token():
    _, out = outcome(QUIET, sessions=1)
    alone = 60 / QUIET.prefill_tokens_s + 1 / QUIET.decode_tokens_s
    assert max(out.first_s) == pytest.approx(alone)
    assert out.interrupted == out.restored_tokens == out.rerun_tokens == 0


def test_after_failures_everybody_goes_on_elsewhere():
    simulation, out = outcome(QUIET, fails=0.5)
    assert len(simulation._sessions) == 40
    assert {session.home for session in simulation._sessions.values()} <= {None, *simulation._replicas}
    assert len(simulation._replicas) == 4
    assert out.recovery_s
    assert out.restored_tokens + out.rerun_tokens > 0


def test_where_reading_is_slow_tokens_are_run_again():
    _, fast = outcome(replace(QUIET, link_bytes_s=1e11), fails=0.5)
    _, slow = outcome(replace(QUIET, link_bytes_s=1e11, store_bytes_s=1e6), fails=0.5)
    assert fast.rerun_tokens < fast.restored_tokens / 2
    assert slow.restored_tokens == 0
    assert slow.rerun_tokens > 0


def test_a_broken_answer_waits_for_its_lease_and_for_its_tokens_one_by_one():
    site = replace(QUIET, replicas=2, link_bytes_s=1.0, decode_tokens_s=0.1, again_tokens_s=0.2, notice_s=7)
    simulation, out = outcome(site, sessions=1, fails=0.5, answer_tokens=1000)
    (session,) = simulation._sessions.values()
    given = session.answered - 1000
    assert out.interrupted == 1
    assert given > 0
    assert out.recovery_s == [pytest.approx(7 + 5 * given + 8252 / site.prefill_tokens_s + 10, abs=0.1)]


def test_sessions_of_a_replica_that_leaves_go_on_elsewhere():
    simulation, out = outcome(QUIET, leaves=1)
    assert len(simulation._replicas) == 3
    assert out.interrupted == 0
    assert out.moves
    assert min(out.moves) >= 0.75 * 1800
    homes = {session.home for session in simulation._sessions.values()}
    assert homes <= {None, *simulation._replicas}
