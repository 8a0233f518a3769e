"""A run of the virtual cluster survives what clusters do to it, and ends where the undisturbed run ends."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forked import DITMOE, run_forked
from tests.slurm.supervision.supervised import CONFIG, Supervised, curve, weights


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_survives(make_run: Callable[..., Supervised], undisturbed: Path) -> None:
    """One disaster after the other."""
    run = make_run()
    cluster = run.cluster
    run.prepare(limits={"step": 20.0, "save": 20.0})
    job = run.submit()

    def of(attempt: int) -> tuple[str, str]:
        run.wait_for_end(attempt)
        end = run.record.attempts[attempt - 1].end
        assert end is not None
        return end.outcome, end.decision

    run.wait_for_training(1)
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    assert of(1) == ("stopped", "requeue")

    run.wait_for_training(2)
    cluster.run("scancel", "--signal=TERM", job)
    assert of(2) == ("stopped", "requeue")

    run.wait_for_training(3)
    os.kill(run.of_rank(1)[0], signal.SIGSTOP)
    assert of(3) == ("hung", "requeue")
    end = run.record.attempts[2].end
    assert end is not None and "rank 1 (n2)" in end.reason, end

    run.wait_for_training(4)
    preempting = cluster.submit("sleep 1", "--partition=high", "--nodes=2", "--exclusive")
    cluster.wait_for_state(preempting, "COMPLETED")
    assert of(4) == ("stopped", "requeue")

    run.wait_for_training(5)
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.wait_for_state(job, "PENDING", seconds=60)
    cluster.run(
        "scontrol", "update", "nodename=n2", "state=resume", check=False
    )  # it may have come back by itself

    cluster.wait_for_state(job, "COMPLETED", seconds=300)
    assert curve(run.run) == curve(undisturbed)
    assert weights(run.run) == weights(undisturbed)
    outcomes = [attempt.end.outcome for attempt in run.record.attempts if attempt.end is not None]
    # A lost node's job is signalled on the others: its end is seen or not, as fast as they are.
    assert outcomes.pop(4) in ("cut-off", "stopped", "failed")
    assert outcomes == ["stopped", "stopped", "hung", "stopped", "complete"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_survives_usr1_and_the_loss_of_a_node(
    make_run: Callable[..., Supervised], undisturbed: Path
) -> None:
    """The signal reaches all processes of the step; the power of n2 goes, and with it all that ran there."""
    run = make_run()
    cluster = run.cluster
    run.prepare(limits={"step": 20.0, "save": 20.0})
    job = run.submit()

    run.wait_for_training(1)
    cluster.run("scancel", "--signal=USR1", job)
    run.wait_for_end(1)

    run.wait_for_training(2)
    cluster.kill_node("n2")
    cluster.wait(lambda: cluster.node_states()["n2"].startswith("down"), "the controller to notice", 90)
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "2", lambda: f"the requeue: {run.output[-3000:]}", 90)
    cluster.start_node("n2")

    cluster.wait_for_state(job, "COMPLETED", seconds=200)
    assert curve(run.run) == curve(undisturbed)
    assert weights(run.run) == weights(undisturbed)
    first, second, *others, last = (attempt.end for attempt in run.record.attempts if attempt.end is not None)
    assert (first.outcome, first.decision) == ("stopped", "requeue") and "SIGUSR1" in first.reason, first
    # Who is sooner: Slurm, which ends the job on the other nodes, or the watchdog, which misses rank 1.
    assert second.outcome in ("cut-off", "stopped", "failed", "hung") and second.decision == "requeue", second
    assert second.outcome != "hung" or "rank 1 (n2)" in second.reason, second
    # Slurm may end the next attempt on n2 as well: it still has an order to end the job there, which it repeats.
    assert {end.decision for end in others} <= {"requeue"}, others
    assert (last.outcome, last.decision) == ("complete", "done")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_survives_its_time_limit(make_run: Callable[..., Supervised], shards: Path, tmp_path: Path) -> None:
    """Slurm's own, of the shortest kind, as a user asks for it; the run itself would not end."""
    run = make_run(steps=10**6)
    job = run.submit_as_a_user("--time=1", "--warning=10", "--no-check")
    run.wait_for_end(1)
    end = run.record.attempts[0].end
    assert end is not None and (end.outcome, end.decision) == ("stopped", "requeue"), end
    assert "SIGUSR2" in end.reason and end.step, end
    run.wait_for_training(2)
    assert (run.cluster.job(job)["JobState"], run.cluster.job(job)["Restarts"]) == ("RUNNING", "1")
    assert run.record.attempts[1].step == end.step  # nothing is trained again
    run.cluster.run("scancel", job)
    run.cluster.wait_for_state(job, "CANCELLED")

    found = curve(run.run)
    assert [record["step"] for record in found] == list(range(1, len(found) + 1)) and len(found) > end.step
    reference = tmp_path / "reference.yaml"
    reference.write_text(CONFIG.format(run=tmp_path / "reference", shards=shards, processes=2, steps=len(found)))
    trained = run_forked([*DITMOE, "train", str(reference)], tmp_path / "output", 2)
    assert trained.returncode == 0, trained.stderr
    assert curve(tmp_path / "reference") == found
