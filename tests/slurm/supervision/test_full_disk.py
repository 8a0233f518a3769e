"""A disk that fills while a job of a real Slurm trains: one message, nothing lost, and it can go on."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ditmoe.parallel.checkpoint.folder import newest_checkpoint, step_of
from ditmoe.slurm.attempts import End
from tests.slurm.cluster import Cluster, running, why_not
from tests.slurm.supervision.supervised import CONFIG, STEPS, Supervised, curve, weights
from tests.small_disk import small_file_system


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MB."""
    with small_file_system(tmp_path / "disk", 24) as folder:
        yield folder


@pytest.fixture
def cluster(small_disk: Path, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of its own: nodes have the file systems that are mounted when they start."""
    if reason := why_not():
        pytest.skip(reason)
    with running(tmp_path / "slurm") as started:
        yield started


def fill(run: Supervised, ballast: Path) -> None:
    """Take every byte of the disk, those too that the run sets free, until the job has ended."""
    with ballast.open("ab", buffering=0) as file:

        def full_and_ended() -> bool:
            with suppress(OSError):
                while True:
                    file.write(bytes(4096))
            return run.cluster.state(run.job) != "RUNNING"

        run.wait(full_and_ended, "the end of the job")


def ended(run: Supervised) -> End:
    end = run.record.attempts[-1].end
    assert end is not None, run.output
    return end


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_disk_that_fills_while_a_job_trains(
    cluster: Cluster, small_disk: Path, tmp_path: Path, shards: Path, undisturbed: Path
) -> None:
    """The disk is that of the job's record, too."""
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(run=small_disk / "run", shards=shards, processes=1, steps=STEPS))
    run = Supervised(cluster, small_disk / "run", config)
    run.prepare()
    run.submit()
    run.wait_for_training(1)
    ballast = small_disk / "ballast"
    fill(run, ballast)
    assert os.statvfs(small_disk).f_bfree == 0
    assert cluster.state(run.job) == "FAILED" and cluster.job(run.job)["ExitCode"] == "2:0", run.output
    assert cluster.job(run.job)["Restarts"] == "0"
    end = ended(run)
    assert (end.outcome, end.decision) == ("user-error", "stop")
    # A record of training met it, or a checkpoint: each names its file.
    assert f"{run.run}" in end.reason and "could not be written" in end.reason, end
    assert "No space left on device" in end.reason and "free some space" in end.reason, end
    kept = newest_checkpoint(run.run)
    assert kept is not None and step_of(kept) == end.step
    assert weights(run.run)  # it can be read
    told = run.status()
    assert "failed" in told and "could not be written" in told and "No space left on device" in told, told

    ballast.unlink()
    run.submit()
    cluster.wait_for_state(run.job, "COMPLETED", "FAILED", seconds=200)
    assert cluster.state(run.job) == "COMPLETED", run.output
    assert run.record.attempts[-1].step == end.step and ended(run).outcome == "complete"
    assert run.record.damaged == ()
    assert curve(run.run) == curve(undisturbed)
    assert weights(run.run) == weights(undisturbed)
