"""A run is asked for a checkpoint before it is ended, its waiting jobs go, and what happened is said."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from ditmoe.model.errors import UserError
from ditmoe.slurm.attempts import read_attempts, record_submission
from ditmoe.slurm.cancel import cancel_run
from ditmoe.slurm.client import Output, Queue, Unseen
from ditmoe.slurm.job_folder import evaluation_folder, training_folder
from ditmoe.slurm.status.read import CONFIG, STATE, read_snapshots
from tests.slurm.cluster import Cluster


class Slurm:
    """A queue: job → state. What a job does when it gets a signal, its test says."""

    def __init__(self, jobs: dict[str, str], on_signal: Callable[[str], str]) -> None:
        self.jobs, self.on_signal = jobs, on_signal
        self.orders: list[str] = []

    def __call__(self, command: Sequence[str], seconds: float) -> Output | Unseen:
        if command[0] == "squeue":
            lines = [
                "\x1f".join([job, state, "None", "n1", "1", "2", "3", "x"]) for job, state in self.jobs.items()
            ]
            return Output(0, "\n".join(lines), "")
        if command[0] != "scancel":
            return Unseen(f"{command[0]} cannot be run")
        self.orders.append(" ".join(command[1:]))
        job = command[-1]
        sent = any(option.startswith("--signal") for option in command)
        self.jobs[job] = self.on_signal(job) if sent else "CANCELLED"
        return Output(0, "", "")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that job 7 was to train."""
    folder = tmp_path / "run"
    training_folder(folder).path.mkdir(parents=True)
    training_folder(folder).job.write_text("{}")
    (folder / CONFIG).write_text("train: {steps: 9}\n")
    record_submission(training_folder(folder).path, "7", time.time())
    return folder


def cancelled(run: Path, slurm: Slurm, seconds: float = 60) -> list[str]:
    said: list[str] = []
    cancel_run(run, Queue(slurm), seconds, said.append, poll=0.01)
    return said


def test_a_job_that_runs_is_asked_and_seen_to_end(run: Path) -> None:
    slurm = Slurm({"7": "RUNNING"}, lambda job: "COMPLETED")
    said = cancelled(run, slurm)
    assert slurm.orders == ["--batch --signal=TERM 7"]
    assert said == [
        "job 7 on n1 was asked to save a checkpoint and end",
        "job 7 has ended, after 0 s",
        "no checkpoint was saved",
    ]
    assert read_attempts(training_folder(run).path).cancelled == {"7"}


def test_a_job_that_is_not_ours_has_its_steps_asked(run: Path) -> None:
    """Its batch script may have no trap: bash would end at once, and the training with it."""
    training_folder(run).job.unlink()
    slurm = Slurm({"7": "RUNNING"}, lambda job: "COMPLETED")
    cancelled(run, slurm)
    assert slurm.orders == ["--signal=TERM 7"]


def test_a_job_that_requeues_itself_all_the_same_leaves_the_queue(run: Path) -> None:
    slurm = Slurm({"7": "RUNNING"}, lambda job: "PENDING")
    said = cancelled(run, slurm)
    assert slurm.orders == ["--batch --signal=TERM 7", "7"]
    assert "job 7 waited (PENDING), and is taken out of the queue" in said


def test_a_job_that_does_not_end_is_ended(run: Path) -> None:
    slurm = Slurm({"7": "RUNNING"}, lambda job: "RUNNING")
    said = cancelled(run, slurm, seconds=0.05)
    assert slurm.orders == ["--batch --signal=TERM 7", "7"]
    assert said[1] == "job 7 goes on 0 s after the request, and is ended"


def test_now_ends_it_at_once(run: Path) -> None:
    slurm = Slurm({"7": "RUNNING"}, lambda job: "RUNNING")
    assert cancelled(run, slurm, seconds=0)[0] == "job 7 is ended without a checkpoint"
    assert slurm.orders == ["7"]


def test_chained_jobs_and_evaluations_go_too(run: Path) -> None:
    record_submission(training_folder(run).path, "8", time.time())
    evaluation = evaluation_folder(run, ["evaluate"])
    evaluation.path.mkdir(parents=True)
    evaluation.job.write_text("{}")
    record_submission(evaluation.path, "9", time.time())
    record_submission(evaluation.path, "10", time.time())
    jobs = {"7": "RUNNING", "8": "PENDING", "9": "PENDING", "10": "RUNNING"}
    slurm = Slurm(jobs, lambda job: "COMPLETED")
    cancelled(run, slurm)
    assert slurm.orders == ["8", "9", "--batch --signal=TERM 7", "10"]
    assert read_attempts(evaluation.path).cancelled == {"9", "10"}


def test_where_nothing_runs_nothing_is_done(run: Path) -> None:
    (run / STATE).write_text(json.dumps({"state": "stopped", "reason": "SIGTERM came", "time": 5, "job": "7"}))
    slurm = Slurm({"7": "COMPLETED"}, lambda job: "COMPLETED")
    assert cancelled(run, slurm) == ["nothing of it runs or waits: it is stopped (SIGTERM came)"]
    assert slurm.orders == [] and not read_attempts(training_folder(run).path).cancelled


def test_a_queue_that_is_not_seen_is_an_error(run: Path) -> None:
    with pytest.raises(UserError, match=r"were not seen: squeue cannot be run\. Nothing was cancelled"):
        cancel_run(run, Queue(lambda command, seconds: Unseen(f"{command[0]} cannot be run")), 60, print)


def test_a_refused_order_is_an_error_unless_the_job_has_ended(run: Path) -> None:
    def refuses(ended: bool) -> Slurm:
        slurm = Slurm({"7": "RUNNING"}, lambda job: "RUNNING")
        plain = slurm.__call__

        def answer(command: Sequence[str], seconds: float) -> Output | Unseen:
            if command[0] == "scancel":
                slurm.jobs["7"] = "COMPLETED" if ended else "RUNNING"
                return Output(1, "", "scancel: error: Access/permission denied")
            return plain(command, seconds)

        return answer  # type: ignore[return-value]

    with pytest.raises(UserError, match="Access/permission denied"):
        cancelled(run, refuses(ended=False))
    assert "job 7 has ended, after 0 s" in cancelled(run, refuses(ended=True))


def test_a_run_of_another_host_is_refused_with_its_name(run: Path) -> None:
    (run / "slurm/train/attempts.jsonl").unlink()
    now = time.time()
    (run / STATE).write_text(json.dumps({"state": "training", "time": now, "host": "there", "job": None}))
    with pytest.raises(UserError, match="host there trains it"):
        cancelled(run, Slurm({}, lambda job: ""))
    (run / STATE).write_text(json.dumps({"state": "training", "time": now - 9999, "host": "there", "job": None}))
    with pytest.raises(UserError, match="whether it runs cannot be seen"):
        cancelled(run, Slurm({}, lambda job: ""))


HOLDER = """
import signal, sys, time
from pathlib import Path
from ditmoe.launcher.local.signals import StopSignal
from ditmoe.launcher.training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock(), StopSignal() as stop:
    print("held", flush=True)
    while sys.argv[2] == "ignore" or not stop.requested:
        time.sleep(0.02)
"""


@pytest.fixture
def held(run: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A process of this machine that holds the run as training does, and ends when it is asked, or never."""
    (run / "slurm/train/attempts.jsonl").unlink()
    program = [sys.executable, "-c", HOLDER, str(run), getattr(request, "param", "obey")]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        yield holder
        holder.kill()


def test_a_process_of_this_machine_is_asked_and_seen_to_end(run: Path, held: subprocess.Popen[str]) -> None:
    said = cancelled(run, Slurm({}, lambda job: ""))
    assert held.wait(60) == 0
    assert said[0] == f"process {held.pid} was asked for a checkpoint and its end"
    assert said[1].startswith(f"process {held.pid} has let go of the run after")


@pytest.mark.parametrize("held", ["ignore"], indirect=True)
def test_a_process_that_does_not_end_is_not_killed_unless_that_is_asked(
    run: Path, held: subprocess.Popen[str]
) -> None:
    with pytest.raises(UserError, match="repeat with --now to end it without"):
        cancelled(run, Slurm({}, lambda job: ""), seconds=0.1)
    assert held.poll() is None
    assert cancelled(run, Slurm({}, lambda job: ""), seconds=0)[0] == f"process {held.pid} was killed"
    assert held.wait(60) == -signal.SIGKILL


TRAINING = """
trap 'kill -TERM $!; wait $!; exit 0' TERM
python -c '
import json, os, signal, sys, time
from pathlib import Path
run = Path(sys.argv[1])
def write(word, reason=""):
    (run / "state.json").write_text(json.dumps({"state": word, "reason": reason, "time": time.time(), "step": 3,
        "steps": 9, "host": "n1", "job": os.environ["SLURM_JOB_ID"], "images": 24, "images_per_second": 4.0}))
def stop(*_):
    write("stopped", "SIGTERM")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
write("training")
while True:
    time.sleep(0.05)
' "$RUN" &
wait $!
wait $!
"""


def test_on_the_cluster(cluster: Cluster, run: Path) -> None:
    """Two jobs of a chain: the one that runs saves and ends, the one that waits goes; both are seen."""
    assert os.environ["SLURM_CONF"]
    (run / "slurm/train/attempts.jsonl").unlink()
    options = ("--output=/dev/null", "--nodes=2", "--job-name=chain", "--dependency=singleton")
    jobs = [cluster.submit(TRAINING, *options, environment={"RUN": str(run)}) for _ in range(2)]
    for job in jobs:
        record_submission(training_folder(run).path, job, time.time())
    cluster.wait(lambda: (run / STATE).exists(), "the training", 60)
    (found,) = read_snapshots([run], Queue())
    assert not isinstance(found.queue, Unseen) and found.queue is not None
    assert [found.queue[job].state for job in jobs] == ["RUNNING", "PENDING"]
    said: list[str] = []
    cancel_run(run, Queue(), 60, said.append, poll=0.2)
    assert said[:2] == [
        f"job {jobs[1]} waited (Dependency), and is taken out of the queue",
        f"job {jobs[0]} on n1, n2 was asked to save a checkpoint and end",
    ]
    assert cluster.state(jobs[0]) == "COMPLETED" and cluster.state(jobs[1]) == "CANCELLED"
    assert json.loads((run / STATE).read_text())["state"] == "stopped"
    cancel_run(run, Queue(), 60, said.append)
    assert said[-1] == "nothing of it runs or waits: it is stopped (SIGTERM)"
