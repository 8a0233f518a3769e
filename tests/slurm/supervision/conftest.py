"""Digits to train on, and the run that nothing happens to."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forked import DITMOE, run_forked
from tests.slurm.cluster import Cluster
from tests.slurm.supervision.supervised import CONFIG, STEPS, Supervised


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run of the same layout that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(run=folder / "run", shards=shards, processes=2, steps=STEPS))
    result = run_forked([*DITMOE, "train", str(config)], folder / "output", 2)
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.fixture
def make_run(cluster: Cluster, tmp_path: Path, shards: Path) -> Callable[..., Supervised]:
    """Writes the configuration of a run on the cluster."""

    def make(name: str = "run", steps: int = STEPS) -> Supervised:
        config = tmp_path / f"{name}.yaml"
        config.write_text(CONFIG.format(run=tmp_path / name, shards=shards, processes=1, steps=steps))
        return Supervised(cluster, tmp_path / name, config)

    return make
