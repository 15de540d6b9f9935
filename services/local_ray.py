"""What a Ray that this machine starts for itself is told first."""

from __future__ import annotations

import os
import secrets
import sys


def prepare_ray() -> None:
    """Set what Ray reads when it is imported. No effect on a Ray that the caller has imported already."""
    if "ray" in sys.modules:
        return
    # Said outright, since Ray's own default depends on what lies in the user's home; the token lives as long as we.
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
