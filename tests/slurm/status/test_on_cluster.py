"""Where runs stand, as a real queue has it: a job that waits, runs, loses its node, and one that nobody knows."""

import json
import time
from pathlib import Path

from ditmoe.slurm.attempts import record_submission
from ditmoe.slurm.client import Queue
from ditmoe.slurm.job_folder import job_name, training_folder
from ditmoe.slurm.status.detectors import findings, health
from ditmoe.slurm.status.read import CONFIG, STATE, read_snapshots
from ditmoe.slurm.status.standing import Standing, standing
from tests.slurm.cluster import Cluster

JOB = """
echo '{"state": "training", "time": '$(date +%s)', "job": "'$SLURM_JOB_ID'"}' > $STATE
sleep 100
"""


def seen(run: Path) -> tuple[Standing, str, list[str]]:
    (snapshot,) = read_snapshots([run], Queue())
    where, found = standing(snapshot), findings(snapshot)
    return where, health(where, found), [finding.kind for finding in found]


def test_a_job_from_the_queue_to_its_end(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / CONFIG).write_text("train: {steps: 9}\n")
    folder = training_folder(run)
    name = f"--job-name={job_name(folder)}"
    environment = {"STATE": str(run / STATE)}
    held = cluster.submit(
        JOB, name, "--hold", "--no-requeue", "--nodes=2", "--output=/dev/null", environment=environment
    )
    folder.path.mkdir(parents=True)
    # Handed in by hand: it is found by its name.
    where, well, kinds = seen(run)
    assert (where.word, where.job, where.reason, well) == ("pending", held, "JobHeldUser", "problem")
    assert kinds == ["never-starts"]
    record_submission(folder.path, held, time.time())
    cluster.run("scontrol", "release", held)
    cluster.wait(lambda: (run / STATE).exists() and seen(run)[0].word == "training", "the training", 60)
    where, well, kinds = seen(run)
    assert (well, kinds) == ("healthy", [])
    assert where.queued is not None and where.queued.hosts == ("n1", "n2")
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.wait(lambda: seen(run)[0].word == "cut off", "the loss of a node to be seen", 60)
    where, well, kinds = seen(run)
    assert (where.reason, well, kinds) == (f"job {held} has ended: NODE_FAIL", "problem", ["cut-off"])


def test_a_job_of_another_cluster_is_unknown(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("train: {steps: 9}\n")
    state = {"state": "training", "time": time.time(), "job": "987654"}
    (tmp_path / STATE).write_text(json.dumps(state))
    where, well, _ = seen(tmp_path)
    assert (where.word, well) == ("unknown", "unknown")
    assert where.reason == "its files are fresh, but the queue here does not have job 987654"
