"""The batch script on a real Slurm: what sbatch reads in it, signals, and what follows when its program is killed.

The program that it starts is exchanged while the job is held, for one that does what a test needs.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditmoe.slurm.attempts import read_attempts
from ditmoe.slurm.client import Queue
from ditmoe.slurm.job_folder import Job, job_name, training_folder
from ditmoe.slurm.submission import snapshot
from ditmoe.slurm.submission.script import Request, render
from ditmoe.slurm.submission.settings import JobSettings
from ditmoe.slurm.submission.submit import submit
from tests.slurm.cluster import Cluster
from tests.slurm.submission.golden import CASES

START = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
def record(event):
    with open(folder / "attempts.jsonl", "a") as file:
        file.write('{"event": "%s"}\\n' % event)
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
"""


@pytest.fixture
def hand_in(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, Path]]:
    """Submits a job whose supervisor is a text of Python; returns its id and its job folder."""
    monkeypatch.setattr(snapshot, "PARTS", ("configs", "slurm"))

    def make(program: str, run: str = "run", start: bool = True, **values: Any) -> tuple[str, Path]:
        settings = JobSettings.model_validate({"sbatch": {"hold": True, **values.pop("sbatch", {})}, **values})
        folder = training_folder(tmp_path / run)
        job = Job(
            *(job_name(folder), "train", ("train",), str(tmp_path / run), settings.nodes, 1, 0, str(tmp_path)),
            *("python", ("python",), (), settings.limit_seconds, settings.warning_seconds),
        )
        (number,) = submit(Request(job, folder, settings), Queue())
        (folder.code / "ditmoe/slurm/supervise.py").write_text(START + program)
        if start:
            cluster.run("scontrol", "release", number)
        return number, folder.path

    return make


def output(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("output-*.txt")))


NASTY = [
    "it's",
    'a "b" c',
    "$HOME `id` $(id)",
    "back\\slash",
    "# 1",
    "%j %%",
    "tab-less  spaces",
    "é ∑",
    "a=b;c|d&e",
]


@pytest.mark.parametrize("value", NASTY)
def test_slurm_reads_values_as_they_were_given(hand_in: Callable[..., Any], cluster: Cluster, value: str) -> None:
    job, _ = hand_in("", start=False, sbatch={"comment": value})
    assert f" Comment={value} " in cluster.run("scontrol", "-o", "show", "job", job)


@pytest.mark.parametrize("name", ["50% of it's $HOME", 'a "b" `c` #1', "é ∑;|&", "-x", "%j"])
def test_folders_of_any_name(hand_in: Callable[..., Any], cluster: Cluster, tmp_path: Path, name: str) -> None:
    job, folder = hand_in('print("in", folder, os.getcwd())', run=name)
    cluster.wait_for_state(job, "COMPLETED")
    assert folder == tmp_path / name / "slurm" / "train"
    assert (folder / f"output-{job}.txt").read_text() == f"in {folder} {tmp_path}\n"


@pytest.mark.parametrize("name", [name for name in CASES if name != "gpus"])
def test_slurm_takes_the_golden_scripts(cluster: Cluster, tmp_path: Path, name: str) -> None:
    """`gpus` asks for more than there is, and for partitions, features and accounts that are not there."""
    script = tmp_path / "job.sbatch"
    text = (
        render(CASES[name])
        .replace("--gres=gpu:4", "--gres=gpu:2")
        .replace("--ntasks-per-node=4", "--ntasks-per-node=2")
    )
    script.write_text("\n".join(line for line in text.splitlines() if "--dependency" not in line))
    cluster.run("sbatch", "--test-only", str(script))


def test_a_script_starts_again_from_any_folder(
    hand_in: Callable[..., Any], cluster: Cluster, tmp_path: Path
) -> None:
    job, folder = hand_in('print(os.getcwd(), os.environ.get("RANK"), os.environ["PYTHONPATH"].split(":")[0])')
    cluster.wait_for_state(job, "COMPLETED")
    script = str(tmp_path / "run" / "submit.sbatch")
    second = cluster.run("env", "-C", "/", "RANK=7", "sbatch", "--parsable", script).strip()
    cluster.run("scontrol", "release", second)
    cluster.wait_for_state(second, "COMPLETED")
    assert output(folder) == f"{tmp_path} None {folder / 'code'}\n" * 2


def test_signals_reach_the_supervisor(hand_in: Callable[..., Any], cluster: Cluster) -> None:
    program = """
heard = []
def hear(number, frame):
    heard.append(signal.Signals(number).name)
    (folder / heard[-1]).touch()
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, hear)
(folder / "ready").touch()
while len(heard) < 3:
    time.sleep(0.05)
sys.exit(5)
"""
    job, folder = hand_in(program)
    cluster.wait(lambda: (folder / "ready").exists(), "the supervisor", 30)
    for name in ("USR1", "USR2", "TERM"):
        cluster.run("scancel", "--batch", f"--signal={name}", job)
        cluster.wait(lambda name=name: (folder / f"SIG{name}").exists(), name, 20)  # type: ignore[misc]
    cluster.wait_for_state(job, "FAILED")
    assert cluster.job(job)["ExitCode"] == "5:0"


def test_a_supervisor_that_is_killed_is_started_again_and_counted(
    hand_in: Callable[..., Any], cluster: Cluster
) -> None:
    program = """
record("start")
if restart == 0:
    kill()
record("end")
"""
    job, folder = hand_in(program)
    cluster.wait_for_state(job, "COMPLETED", seconds=90)
    assert cluster.job(job)["Restarts"] == "1"
    assert "the supervisor was killed by signal 9\nditmoe: the job is queued again" in output(folder)
    assert (folder / "attempts.jsonl").read_text().count('"end"') == 1


@pytest.mark.parametrize("recorded", ["", 'record("start"); record("end"); '])
def test_a_supervisor_that_dies_before_its_start_or_after_its_end_is_not_repeated(
    hand_in: Callable[..., Any], cluster: Cluster, recorded: str
) -> None:
    """The first would go on for ever: no attempt counts it. The second has decided."""
    job, folder = hand_in(f"{recorded}kill()")
    cluster.wait_for_state(job, "FAILED")
    facts = cluster.job(job)
    assert (facts["Restarts"], facts["ExitCode"]) == ("0", "137:0")
    assert "queued again" not in output(folder)


def test_a_job_that_is_cancelled_stays_so(hand_in: Callable[..., Any], cluster: Cluster) -> None:
    job, folder = hand_in('record("start"); (folder / "ready").touch(); time.sleep(100)')
    cluster.wait(lambda: (folder / "ready").exists(), "the supervisor", 30)
    cluster.run("scancel", job)
    cluster.wait_for_state(job, "CANCELLED")
    cluster.wait(lambda: not cluster.run("squeue", "-h", "-t", "all", "-t", "PD,R,CG"), "an empty queue", 30)
    assert cluster.job(job)["JobState"] == "CANCELLED" and cluster.job(job)["Restarts"] == "0"


def test_a_node_without_scontrol(hand_in: Callable[..., Any], cluster: Cluster, tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    for program in ("python", "wc", "tail", "grep"):
        found = cluster.run("which", program).strip()
        (bare / program).symlink_to(found)
    job, folder = hand_in('record("start"); kill()', preamble=f"PATH={bare}")
    cluster.wait_for_state(job, "FAILED")
    assert "this node has no scontrol; the next job of the chain goes on" in output(folder)


def test_two_jobs_of_a_run_come_one_after_the_other(
    hand_in: Callable[..., Any], cluster: Cluster, tmp_path: Path
) -> None:
    """By hand, too: the name has the run's path in it."""
    job, folder = hand_in('print("in"); time.sleep(1.5); print("out")')
    second = cluster.run("sbatch", "--parsable", str(tmp_path / "run" / "submit.sbatch")).strip()
    cluster.run("scontrol", "release", second)
    cluster.wait_for_state(second, "COMPLETED", seconds=90)
    assert (folder / f"output-{job}.txt").stat().st_mtime <= (folder / f"output-{second}.txt").stat().st_mtime
    ended, started = cluster.job(job)["EndTime"], cluster.job(second)["StartTime"]
    assert ended <= started


def test_a_second_submission_is_refused_by_the_queue(hand_in: Callable[..., Any], cluster: Cluster) -> None:
    job, folder = hand_in("", start=False)
    with pytest.raises(Exception, match=rf"job {job} is PENDING"):
        hand_in("", start=False)
    assert [each.job for each in read_attempts(folder).submissions] == [job]
    assert os.listdir(folder.parent) == ["train"]
