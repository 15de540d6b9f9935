"""What tests of several services share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services.cluster import Cluster, open_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One for all tests, since it takes half a minute to start. Its second node may be gone."""
    with open_cluster() as made:
        yield made
