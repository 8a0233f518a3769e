"""Slurm's programs: what they print is read, what they refuse is told, and that they are missing is an answer."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from ditmoe.model.errors import UserError
from ditmoe.slurm.client import ASK_SECONDS, Output, Queue, QueuedJob, Unseen, run_program
from tests.slurm.cluster import Cluster

COLUMNS = ["7", "RUNNING", "None", "n[1-2]", "1795912431", "1795912440", "1795912500", "a\x1f|b c"]
SQUEUE = "\x1f".join(COLUMNS) + "\n"
SCONTROL = (
    "JobId=7 JobName=a b=c UserId=root(0) JobState=RUNNING Reason=None ReqB:S:C:T=0:0:*:* CPUs/Task=1"
    " ExcNodeList=n[3-4] Command=/x/a script.sh --k=v WorkDir=/tmp Power= \n"
)


class Programs:
    """Answers in the order of the questions; keeps these."""

    def __init__(self, *answers: Output | Unseen) -> None:
        self.answers = list(answers)
        self.asked: list[Sequence[str]] = []

    def __call__(self, command: Sequence[str], seconds: float) -> Output | Unseen:
        self.asked.append(command)
        return self.answers.pop(0)


def printed(out: str, code: int = 0, err: str = "") -> Queue:
    return Queue(Programs(Output(code, out, err)))


def test_squeue_is_read() -> None:
    job = QueuedJob("7", "RUNNING", "", ("n1", "n2"), 1795912431, 1795912440, 1795912500, name=COLUMNS[-1])
    assert printed(SQUEUE).jobs(["7"]) == {"7": job}
    waiting = "\x1f".join(["8_[1-3%1]", "PENDING", "QOSMaxJobsPerUserLimit", "", "5", "N/A", "N/A", "x y"])
    found = printed(waiting).jobs(["8"])
    assert found == {
        "8_[1-3%1]": QueuedJob("8_[1-3%1]", "PENDING", "QOSMaxJobsPerUserLimit", (), 5, None, None, name="x y")
    }


def test_sacct_is_read() -> None:
    lines = (
        "7|CANCELLED by 1000|0:15|n[1-2]|100|110|120|None|a|b\n"
        "8|FAILED|2:0|n1|100|110|120|NonZeroExitCode|c\n"
        "9|RUNNING|0:0|None assigned|100|Unknown|Unknown||d\n"
    )
    assert printed(lines).accounted(["7", "8", "9"]) == {
        "7": QueuedJob("7", "CANCELLED", "", ("n1", "n2"), 100, 110, 120, 143, "a|b"),
        "8": QueuedJob("8", "FAILED", "NonZeroExitCode", ("n1",), 100, 110, 120, 2, "c"),
        "9": QueuedJob("9", "RUNNING", "", (), 100, None, None, None, "d"),
    }


def test_scontrol_is_read() -> None:
    details = printed(SCONTROL).details("7")
    assert isinstance(details, dict)
    assert (details["JobState"], details["Command"]) == ("RUNNING", "/x/a script.sh --k=v")
    assert (details["CPUs/Task"], details["ReqB:S:C:T"], details["Power"]) == ("1", "0:0:*:*", "")
    assert printed(SCONTROL).excluded("7") == ("n3", "n4")


def test_a_job_that_the_queue_does_not_know_is_not_an_error() -> None:
    unknown = Output(1, "", "slurm_load_jobs error: Invalid job id specified")
    assert Queue(Programs(unknown)).jobs(["99"]) == {}
    assert Queue(Programs(unknown)).details("99") is None
    assert isinstance(Queue(Programs(unknown)).excluded("99"), Unseen)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Output(1, "", "Slurm accounting storage is disabled\n"), "sacct: Slurm accounting storage is disabled"),
        (
            Unseen("sacct cannot be run: No such file or directory"),
            "sacct cannot be run: No such file or directory",
        ),
        (
            Output(0, "something else\n", ""),
            "sacct printed 'something else'; expected the columns that were asked for",
        ),
        (
            Output(0, "7|FAILED|2:0|n[|1|1|1||a\n", ""),
            "sacct printed '7|FAILED|2:0|n[|1|1|1||a'; expected the columns",
        ),
    ],
)
def test_no_answer_is_a_value_with_its_reason(answer: Output | Unseen, reason: str) -> None:
    found = Queue(Programs(answer)).accounted(["7"])
    assert isinstance(found, Unseen) and found.reason.startswith(reason)


def test_nothing_is_asked_of_no_job() -> None:
    queue = Queue(Programs())
    assert queue.jobs([]) == queue.accounted([]) == queue.node_states([]) == {}


def test_the_number_of_a_submitted_job_is_read() -> None:
    programs = Programs(Output(0, "123;cluster\n", ""))
    assert Queue(programs).submit(Path("/x/run.sbatch"), ["--nodes=2"], ["a"]) == "123"
    assert programs.asked == [["sbatch", "--parsable", "--nodes=2", "/x/run.sbatch", "a"]]
    with pytest.raises(UserError, match="expected the number of a job"):
        printed("queued").submit(Path("run.sbatch"))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            Output(
                1,
                "",
                "sbatch: error: invalid partition specified: zz\nsbatch: error: Batch job submission failed\n",
            ),
            "sbatch: invalid partition specified: zz; Batch job submission failed",
        ),
        (Output(7, "", ""), "sbatch: exit code 7"),
        (
            Unseen("sbatch gave no answer within 120 s", "a controller that answers"),
            "sbatch gave no answer within 120 s; expected a controller that answers",
        ),
    ],
)
def test_a_refused_order_is_told_in_the_programs_words(answer: Output | Unseen, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Queue(Programs(answer)).submit(Path("run.sbatch"))
    assert str(caught.value).startswith(message)


def test_what_scancel_refuses_with_exit_code_0_is_told() -> None:
    with pytest.raises(UserError, match="Invalid job id"):
        printed("", 0, "scancel: error: Kill job error on job id 9: Invalid job id specified\n").cancel("9")


def test_a_missing_program_and_a_slow_one_are_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = run_program(["sleep", "60"], 0.1)
    assert isinstance(slow, Unseen) and slow.reason == "sleep gave no answer within 0 s"
    assert slow.problem == "sleep gave no answer within 0 s; expected a controller that answers: " + (
        "`scontrol ping` says whether it is up"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = run_program(["squeue"], 5)
    assert isinstance(missing, Unseen) and missing.reason == "squeue is not on the PATH"
    assert missing.expected.startswith("a machine of a Slurm cluster")
    (tmp_path / "squeue").write_text("#!/no/such/shell\n")
    (tmp_path / "squeue").chmod(0o755)
    broken = run_program(["squeue"], 5)
    assert isinstance(broken, Unseen) and broken.reason == "squeue cannot be run: No such file or directory"


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (
            "x: error: fetch_config: DNS SRV lookup failed\nx: fatal: Could not establish a configuration source",
            1,
            "x finds no configuration of Slurm (slurm.conf)",
        ),
        (
            "x: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
            1,
            "x gets no answer from Slurm: Unable to contact slurm controller (connect failure)",
        ),
        (
            "slurm_load_jobs error: Socket timed out on send/recv operation",
            1,
            "x gets no answer from Slurm: Socket timed out on send/recv operation",
        ),
        ("x: error: Unable to contact slurm controller, and then it answered", 0, None),
        ("x: error: Invalid partition specified", 1, None),
    ],
)
def test_a_failure_of_slurm_is_told_from_a_refusal(
    words: str, code: int, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_text(f"#!/bin/sh\necho '{words}' >&2\nexit {code}\n")
    (tmp_path / "x").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = run_program(["x"], 20)
    if reason is None:
        assert found == Output(code, "", f"{words}\n")
    else:
        assert isinstance(found, Unseen) and found.reason == reason and found.expected


def test_a_users_own_settings_of_the_programs_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    output = run_program(["env"], ASK_SECONDS)
    assert isinstance(output, Output)
    assert "SLURM_TIME_FORMAT=%s" in output.out.splitlines() and "SQUEUE_STATES" not in output.out


def test_the_real_programs(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_STATES", "COMPLETED")
    queue = Queue()
    name, unknown = f"a|b {tmp_path.name}", "9999999"  # squeue still has the jobs of other tests
    script = tmp_path / "a job.sbatch"
    script.write_text(
        f"#!/bin/bash\n#SBATCH --job-name='{name}' --output=/dev/null --requeue\n"
        f"trap 'echo TERM >> {tmp_path}/signals' TERM\necho > {tmp_path}/ready\n"
        "for i in $(seq 600); do sleep 0.1; done\n"
    )
    running = queue.submit(script, ["--nodes=2"])
    waiting = queue.submit(script, [f"--dependency=afterok:{running}"])
    cluster.wait(lambda: (tmp_path / "ready").exists(), "the job", 30)
    jobs = queue.jobs([running, waiting, unknown])
    assert isinstance(jobs, dict) and set(jobs) == {running, waiting}
    first, second = jobs[running], jobs[waiting]
    assert queue.named(name) == jobs and queue.named(f"{name} too") == {}
    assert (first.state, first.hosts, first.reason, first.has_ended) == ("RUNNING", ("n1", "n2"), "", False)
    assert first.submitted is not None and first.starts is not None and first.starts >= first.submitted
    assert (second.state, second.reason, second.hosts, second.starts) == ("PENDING", "Dependency", (), None)
    details = queue.details(running)
    assert isinstance(details, dict) and details["JobState"] == "RUNNING"
    assert (details["Command"], details["Restarts"]) == (str(script), "0")
    assert queue.excluded(waiting) == ()
    assert queue.exclude(waiting, ["n2"]) == ("n2",)
    assert queue.node_states(["n1", "n2", "n9"]) == {"n1": "mixed", "n2": "mixed"}
    assert queue.accounted([running]) == Unseen("sacct: Slurm accounting storage is disabled")
    assert queue.jobs([unknown]) == {} and queue.details(unknown) is None

    queue.signal(running, "TERM")
    cluster.wait(lambda: (tmp_path / "signals").exists(), "the signal", 30)
    queue.requeue(running)
    cluster.wait(lambda: cluster.job(running)["Restarts"] == "1", "the requeue", 30)
    for job in (waiting, running):
        queue.cancel(job)
        cluster.wait_for_state(job, "CANCELLED")
    jobs = queue.jobs([running])
    assert isinstance(jobs, dict) and jobs[running].has_ended
    with pytest.raises(UserError, match=r"scontrol: .*Invalid job id specified"):
        queue.requeue(unknown)
    with pytest.raises(UserError, match="invalid partition specified: zz"):
        queue.submit(script, ["--partition=zz"])
