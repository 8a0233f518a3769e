"""The supervisor on a real Slurm, with programs in the place of training that end as the test says."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ditmoe.slurm.attempts import End, record_submission
from ditmoe.slurm.job_folder import training_folder
from ditmoe.slurm.requeue import EXIT_NO_PROGRESS
from tests.slurm.cluster import Cluster
from tests.slurm.supervision.supervised import Supervised

PROGRAM = """#!/bin/bash
# In the place of a task's Python: {run} and $SLURM_PROCID are at hand.
run={run}
save() {{ mkdir -p $run/checkpoints/step-0000000$1; }}
tell() {{ printf '{{"state": "%s", "reason": "%s", "time": %s}}' "$1" "$2" $(date +%s) > $run/state.json; }}
{body}
"""


@pytest.fixture
def play(cluster: Cluster, tmp_path: Path) -> Callable[..., Supervised]:
    """Prepares a job whose tasks are a few lines of shell."""

    def prepare(body: str, **changes: object) -> Supervised:
        run = tmp_path / "run"
        run.mkdir()
        program = tmp_path / "program.sh"
        program.write_text(PROGRAM.format(run=run, body=body))
        program.chmod(0o755)
        supervised = Supervised(cluster, run, tmp_path / "run.yaml")
        supervised.prepare(task=(str(program),), **changes)
        return supervised

    return prepare


def _command_of(folder: Path) -> bytes:
    try:
        return (folder / "cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


def ends(supervised: Supervised) -> list[End]:
    return [attempt.end for attempt in supervised.record.attempts if attempt.end is not None]


@pytest.mark.timeout(200)
def test_what_is_not_requeued(play: Callable[..., Supervised], cluster: Cluster) -> None:
    """A user's error, though srun kills the other task and says so; nor a second time, by anybody."""
    # A second between the two, as `launcher/cli.py` leaves: srun loses the last words of a task that ends at once.
    job = play('[ $SLURM_PROCID = 1 ] && { echo "error: optim.lr: wrong" >&2; sleep 1; exit 2; }; sleep 100')
    number = job.submit()
    cluster.wait_for_state(number, "FAILED")
    (end,) = ends(job)
    assert (end.outcome, end.decision, end.exit_code) == ("user-error", "stop", 2), job.output
    assert "optim.lr: wrong" in end.reason, job.output
    assert cluster.job(number)["ExitCode"] == "2:0" and cluster.job(number)["Restarts"] == "0"
    cluster.run("scontrol", "requeue", number)
    cluster.wait(lambda: cluster.job(number)["Restarts"] == "1", "the requeue", 60)
    cluster.wait_for_state(number, "FAILED")
    assert len(job.record.attempts) == 1 and "not started" in job.output


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_wrong_configuration(make_run: Callable[..., Supervised], cluster: Cluster) -> None:
    """Of training itself: one start, and `ditmoe status` has its message."""
    job = make_run()
    job.config.write_text(job.config.read_text().replace("lr: 1.0e-3", "lr: much"))
    job.prepare()
    number = job.submit()
    cluster.wait_for_state(number, "FAILED")
    facts = cluster.job(number)
    assert (facts["ExitCode"], facts["Restarts"], facts["NodeList"]) == ("2:0", "0", "n[1-2]")
    (end,) = ends(job)
    assert (end.outcome, end.decision, end.suspects) == ("user-error", "stop", ()), job.output
    assert "optim.lr" in end.reason and "much" in end.reason and "Traceback" not in job.output
    told = job.status()
    assert "failed" in told and "optim.lr" in told and "much" in told, told


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_two_jobs_of_a_run_at_once(play: Callable[..., Supervised], cluster: Cluster) -> None:
    """Under names of their own, so that Slurm runs both: the second waits a while, says which works, and ends."""
    body = """
    echo $SLURM_JOB_ID >> $run/worked
    until [ -e $run/go ]; do sleep 0.1; done
    save 3; tell complete"""
    job = play(body, nodes=1)
    first = job.submit("--nodes=1")
    job.wait((job.run / "worked").exists, "the first job's program")
    second = job.submit("--nodes=1", "--job-name=another")
    cluster.wait_for_state(second, "RUNNING")
    cluster.wait_for_state(second, "FAILED", seconds=120)
    assert cluster.job(second)["ExitCode"] == "2:0"
    assert f"job {first} on n1 works on it; expected no other" in job.output
    assert cluster.state(first) == "RUNNING"
    third = job.submit("--nodes=1", "--job-name=a-third")
    cluster.wait_for_state(third, "RUNNING")
    (job.run / "go").touch()
    cluster.wait_for_state(first, "COMPLETED")
    cluster.wait_for_state(third, "COMPLETED")
    assert (job.run / "worked").read_text().split() == [first, third]
    assert [attempt.job for attempt in job.record.attempts] == [first, third], job.output


@pytest.mark.timeout(280)
def test_attempts_that_bring_nothing(play: Callable[..., Supervised], cluster: Cluster) -> None:
    """One dies with its task, one with its batch script's supervisor, one of a signal: then it is enough."""
    body = """
    case $(grep -c '"event": "start"' $run/slurm/train/attempts.jsonl) in
    1) [ $SLURM_PROCID = 1 ] && kill -9 $$; sleep 100;;
    *) trap 'exit 0' USR2; touch $run/waits; while :; do sleep 0.1; done;;
    esac"""
    job = play(body)
    number = job.submit()
    job.wait_for_end(1)
    assert ends(job)[0].outcome == "failed" and "Killed" in ends(job)[0].reason, job.output
    assert ends(job)[0].suspects == ("n2",) and ends(job)[0].excluded == (), "the partition has no other node"
    job.wait(lambda: "too few nodes" in job.output, "the reason why n2 is not left out")
    job.wait((job.run / "waits").exists, "the second attempt")
    cluster.run("scontrol", "requeue", number)
    (job.run / "waits").unlink()
    job.wait((job.run / "waits").exists, "the third attempt")
    cluster.run("scancel", "--batch", "--signal=TERM", number)
    cluster.wait_for_state(number, "FAILED")
    assert cluster.job(number)["ExitCode"] == f"{EXIT_NO_PROGRESS}:0"
    end = ends(job)[-1]
    assert (end.outcome, end.decision) == ("no-progress", "stop") and "3 attempts in a row" in end.reason


@pytest.mark.timeout(280)
def test_a_node_whose_check_fails_is_left_out(play: Callable[..., Supervised], cluster: Cluster) -> None:
    """The queue is asked whether it took that, and the next attempt is on another node."""
    body = """
    if [ "$2" = ditmoe.slurm.check ]; then
        [ $SLURMD_NODENAME = n1 ] && problem='"shows 7 GPUs of 8"'
        report='ditmoe-check {"host": "%s", "problems": [%s], "group": [], "missing": []}\\n'
        printf "$report" $SLURMD_NODENAME "$problem"
        exit
    fi
    save 3; tell complete"""
    job = play(body, check=True, nodes=1)
    number = job.submit("--nodes=1")
    cluster.wait_for_state(number, "COMPLETED", seconds=120)
    first, second = job.record.attempts
    assert first.hosts == ("n1",) and second.hosts == ("n2",)
    failed, complete = ends(job)
    assert failed.outcome == "node-check" and "n1: shows 7 GPUs of 8" in failed.reason
    assert failed.suspects == failed.excluded == ("n1",), job.output
    assert (complete.outcome, complete.decision) == ("complete", "done")
    assert cluster.job(number)["ExcNodeList"] == "n1"


@pytest.mark.timeout(280)
def test_a_chain_where_nodes_have_no_scontrol(
    play: Callable[..., Supervised], cluster: Cluster, tmp_path: Path
) -> None:
    """The second job of the chain goes on; after the last one the job says how to start it again."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("srun", "bash", "sh", "sleep", "mkdir", "grep", "date", "env", "touch"):
        found = cluster.run("bash", "-c", f"command -v {name}").strip()
        (programs / name).symlink_to(found)
    body = """
    save $(grep -c '"event": "start"' $run/slurm/train/attempts.jsonl)
    tell stopped "stopped by SIGUSR2"; sleep 1"""
    job = play(body)
    chain = []
    for _ in range(2):
        chain.append(job.submit("--dependency=singleton", path=f"export PATH={programs}"))
        record_submission(training_folder(job.run).path, chain[-1], time.time())
    cluster.wait_for_state(chain[1], "FAILED", "COMPLETED", seconds=120)
    assert [attempt.job for attempt in job.record.attempts] == chain, job.output
    assert [(end.outcome, end.decision) for end in ends(job)] == [("stopped", "requeue"), ("stopped", "stop")]
    assert f"job {chain[1]} of its chain goes on" in job.output
    assert "submit.sbatch" in ends(job)[1].reason and "scontrol is not on the PATH" in ends(job)[1].reason


@pytest.mark.timeout(280)
def test_what_ends_the_batch_script(play: Callable[..., Supervised], cluster: Cluster) -> None:
    """The time limit's warning comes back to life; scancel and a killed script end it, each with its word."""
    body = """
    trap 'save $(grep -c start $run/slurm/train/attempts.jsonl); tell stopped "stopped by SIGUSR2"; exit 0' USR2
    touch $run/waits; while :; do sleep 0.1; done"""
    job = play(body)
    number = job.submit()
    job.wait((job.run / "waits").exists, "the first attempt")
    cluster.run("scontrol", "update", f"jobid={number}", "timelimit=1")  # the warning comes 30 s before that
    job.wait_for_end(1)
    assert (ends(job)[0].outcome, ends(job)[0].decision) == ("stopped", "requeue"), job.output
    (job.run / "waits").unlink()
    cluster.run("scontrol", "update", f"jobid={number}", "timelimit=1-00:00:00")
    job.wait(lambda: len(job.record.attempts) == 2 and (job.run / "waits").exists(), "the second attempt")
    cluster.run("scancel", number)
    cluster.wait_for_state(number, "CANCELLED")
    job.wait_for_end(2)
    assert (ends(job)[1].outcome, ends(job)[1].decision) == ("cancelled", "stop"), job.output
    assert cluster.job(number)["Restarts"] == "1", "what a user cancels does not come back"


@pytest.mark.timeout(280)
def test_a_batch_script_that_is_killed(play: Callable[..., Supervised], cluster: Cluster) -> None:
    """The supervisor asks for the requeue before Slurm ends it too."""
    body = """
    [ -e $run/waits ] && { save 3; tell complete; exit; }
    touch $run/waits; while :; do sleep 0.1; done"""
    job = play(body)
    number = job.submit()
    job.wait((job.run / "waits").exists, "the first attempt")
    (script,) = [
        int((folder / "status").read_text().partition("PPid:")[2].split()[0])
        for folder in Path("/proc").glob("[0-9]*")
        if f"ditmoe.slurm.supervise\0{job.run}/".encode() in _command_of(folder)
    ]
    os.kill(script, signal.SIGKILL)
    cluster.wait(lambda: cluster.job(number)["Restarts"] == "1", lambda: f"the requeue: {job.output}", 60)
    cluster.wait_for_state(number, "COMPLETED")
    # Where Slurm finds the supervisor by its parents alone, it survives the script and puts the end on record.
    first, second = ends(job)
    assert first.outcome in ("cut-off", "stopped", "failed") and first.decision == "requeue", job.output
    assert (second.outcome, second.decision) == ("complete", "done")
    assert "the batch script was killed" in job.output
