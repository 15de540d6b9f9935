"""A Ray that this machine starts for itself."""

from __future__ import annotations

import logging
import math
import os
import secrets
import sys

from segcore.errors import Unavailable

log = logging.getLogger(__name__)

STARTS = 3


def prepare_ray() -> None:
    """Set what Ray reads when it is imported. No effect on a Ray that the caller has imported already."""
    if "ray" in sys.modules:
        return
    # Said outright, since Ray's own default depends on what lies in the user's home; the token lives as long as we.
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's own default lets workers give way to all else that runs here: beside one busy process they get a fraction.
    os.environ.setdefault("RAY_worker_niceness", "0")


def start_ray(cpus: float, *, log_to_driver: bool = False) -> None:
    """Start one, whatever else runs here, with as many CPUs as there are, or as are asked for. Raises Unavailable."""
    import psutil
    import ray

    for start in range(STARTS):
        try:
            ray.init(
                address="local",
                num_cpus=max(psutil.cpu_count() or 1, math.ceil(cpus)),
                include_dashboard=False,
                object_store_memory=150_000_000,
                log_to_driver=log_to_driver,
                logging_level="WARNING",
            )
            return
        except Exception as error:  # of no class of its own
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            # Just installed, or on a busy machine, its processes take longer than it waits.
            log.warning("Ray took too long to start (%d of %d times)", start + 1, STARTS)
    raise Unavailable("Ray didn't start in time; is the machine very busy?")
