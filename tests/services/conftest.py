"""What tests of several services share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services.cluster import cluster


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The dashboard of a cluster that takes jobs; one for all, since it takes half a minute to start."""
    with cluster() as where:
        yield where
