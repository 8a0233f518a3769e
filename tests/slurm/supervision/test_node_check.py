"""The check of the nodes as each job has it, on a real Slurm whose second node is truly broken."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ditmoe.slurm.job_folder import training_folder
from tests.slurm.cluster import Cluster, running, why_not
from tests.slurm.supervision.supervised import Supervised

TASK = """#!/bin/bash
# In the place of a task's Python: the check is the real one, and training is of no matter here.
if [ "$2" = ditmoe.slurm.check ]; then exec {python} "$@"; fi
mkdir -p {run}/checkpoints/step-00000003
echo '{{"state": "complete", "time": 1}}' > {run}/state.json
"""


@pytest.fixture
def three_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster that has a node in reserve for a job of two."""
    if reason := why_not():
        pytest.skip(reason)
    (tmp_path / "cluster").mkdir()
    with running(tmp_path / "cluster", nodes=3) as cluster:
        for key, value in cluster.variables.items():
            monkeypatch.setenv(key, value)
        yield cluster


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_node_that_cannot_write_the_shared_folder(three_nodes: Cluster, tmp_path: Path) -> None:
    """It is found and left out, the queue is asked whether it took that, and the job is done by another."""
    run, task = tmp_path / "run", tmp_path / "task.sh"
    task.write_text(TASK.format(python=shlex.quote(sys.executable), run=shlex.quote(str(run))))
    task.chmod(0o755)
    job = Supervised(three_nodes, run, tmp_path / "run.yaml")
    job.prepare(check=True, task=(str(task),), tasks_per_node=2)
    folder = str(training_folder(run).path)
    three_nodes.on_node("n2", "mount", "--bind", folder, folder)
    three_nodes.on_node("n2", "mount", "-o", "remount,bind,ro", folder)
    number = job.submit("--ntasks-per-node=2")
    three_nodes.wait_for_state(number, "COMPLETED", "FAILED", seconds=200)
    first, second = job.record.attempts
    assert (first.hosts, second.hosts) == (("n1", "n2"), ("n1", "n3")), job.output
    assert first.end is not None and second.end is not None
    assert (first.end.outcome, first.end.decision) == ("node-check", "requeue")
    assert "n2: " in first.end.reason and "Read-only file system" in first.end.reason
    assert "n1: " not in first.end.reason, "a sound node is not held up by a broken one"
    assert first.end.suspects == first.end.excluded == ("n2",)
    assert three_nodes.job(number)["ExcNodeList"] == "n2"
    assert "the next attempt is to leave out n2: the queue took that" in job.output
    assert (second.end.outcome, second.end.decision) == ("complete", "done"), job.output
