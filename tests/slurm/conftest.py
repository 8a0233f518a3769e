"""The virtual cluster, for tests that need a real Slurm: skipped, with the reason, where it cannot run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked import packed_digits
from tests.slurm.cluster import Cluster, running, why_not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the cluster is run by `make test-slurm`: every job takes several starts of Python."""
    for item in items:
        if "started_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def started_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, started once; it ends with this process, however that ends."""
    if reason := why_not():
        pytest.skip(reason)
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def cluster(started_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """An idle cluster of two nodes, n1 and n2; this process and those it starts speak to it."""
    for key, value in started_cluster.variables.items():
        monkeypatch.setenv(key, value)
    yield started_cluster
    started_cluster.clear()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, packed."""
    return packed_digits(tmp_path_factory.mktemp("data"))
