"""One cluster, and one injector registered with it, for all tests of the folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.control_plane import Cluster
from tests.cluster.control_plane import cluster as running_cluster
from tests.cluster.registered import Injector, injector


@pytest.fixture(scope="session")
def cluster(cluster_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(cluster_parts, tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture(scope="session")
def the_injector(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Injector]:
    with injector(cluster, tmp_path_factory.mktemp("injector")) as made:
        yield made


@pytest.fixture
def webhook(the_injector: Injector) -> Iterator[Injector]:
    """It runs with the settings of the overlay, and whatever a test does to it is undone."""
    yield the_injector
    the_injector.restored()
