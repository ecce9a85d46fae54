"""One cluster, and one injector registered with it, for all tests of the folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.control_plane import Cluster
from tests.cluster.control_plane import cluster as running_cluster
from tests.cluster.registered import KINDS, Injector, injector
from tests.pods.conftest import rig  # noqa: F401 (a fixture)
from tests.support.processes import wait_until


@pytest.fixture(scope="session")
def cluster(cluster_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(cluster_parts, tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture(scope="session")
def bare_cluster(
    cluster_parts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Another one, with nothing in it: who uses it leaves it as it was."""
    with running_cluster(cluster_parts, tmp_path_factory.mktemp("bare")) as made:
        yield made


def assert_bare(cluster: Cluster) -> None:
    """Nothing is in it that it does not come with, once namespaces that are to go have gone."""
    own = {"default", "kube-system", "kube-public", "kube-node-lease"}

    def namespaces() -> set[str]:
        return {each["metadata"]["name"] for each in cluster.get("namespaces")["items"]}

    wait_until(lambda: namespaces() == own, f"no namespaces but {own}")
    roles = cluster.get("clusterroles,clusterrolebindings")["items"]
    assert not [each for each in roles if "mcp-opa" in each["metadata"]["name"]]
    for kind in (*KINDS, "secrets", "configmaps -n default", "deployments -A"):
        found = cluster.get(*kind.split())["items"]
        names = [each["metadata"]["name"] for each in found]
        assert set(names) <= {"kube-root-ca.crt"}, kind


@pytest.fixture(scope="session")
def the_injector(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Injector]:
    with injector(cluster, tmp_path_factory.mktemp("injector")) as made:
        yield made


@pytest.fixture
def webhook(the_injector: Injector) -> Iterator[Injector]:
    """It runs with the settings of the overlay, and whatever a test does to it is undone."""
    yield the_injector
    the_injector.restored()
