"""What the files of a run say is read, also where some are damaged; the queue is asked once for all runs."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import checkpoint_path
from ditmoe.parallel.checkpoint.marker import MARKER
from ditmoe.slurm import attempts
from ditmoe.slurm.attempts import Attempt, record_start, record_submission
from ditmoe.slurm.client import Output, Queue, Unseen
from ditmoe.slurm.heartbeats import Heart, Terms
from ditmoe.slurm.job_folder import evaluation_folder, job_name, training_folder
from ditmoe.slurm.status import read
from ditmoe.slurm.status.read import read_snapshots, runs_below
from ditmoe.slurm.status.snapshot import Owner, Recorded, Saved, State
from ditmoe.slurm.status.standing import standing
from ditmoe.slurm.status.text import as_data, as_text

STATE = {
    "state": "training",
    "step": 20,
    "steps": 100,
    "images": 160,
    "reason": None,
    "time": 1000.0,
    "host": "n1",
    "pid": 5,
    "job": "7",
    "images_per_second": 4.0,
}


class Slurm:
    """Answers as squeue with these jobs; there is no sacct."""

    def __init__(self, *jobs: Sequence[str]) -> None:
        self.jobs = jobs
        self.asked: list[Sequence[str]] = []

    def __call__(self, command: Sequence[str], seconds: float) -> Output | Unseen:
        self.asked.append(command)
        if command[0] != "squeue":
            return Unseen(f"{command[0]} cannot be run: No such file or directory")
        lines = [
            "\x1f".join([job, state, "None", hosts, "1", "2", "3", name]) for job, state, hosts, name in self.jobs
        ]
        return Output(0, "\n".join(lines), "")


def no_queue(command: Sequence[str], seconds: float) -> Output | Unseen:
    raise AssertionError("Slurm is asked, and no job trains the run")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with every file that is read."""
    folder = tmp_path / "runs/a"
    folder.mkdir(parents=True)
    (folder / read.CONFIG).write_text("train: {steps: 100, log_every: 10, checkpoint_every: 20, batch: 8}\n")
    (folder / read.STATE).write_text(json.dumps(STATE))
    lines = [{"step": step, "loss": 2.0, "images_per_second": 4.0} for step in (10, 20)]
    lines[1] |= {"loss": None, "skipped_steps": [11]}  # type: ignore[dict-item]
    (folder / read.STATS).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "lo')
    checkpoint = checkpoint_path(folder, 20)
    checkpoint.mkdir(parents=True)
    (checkpoint / MARKER).write_text(json.dumps({"files": {"a": {"bytes": 5}, "b": {"bytes": 7}}}))
    os.utime(checkpoint / MARKER, (900, 900))
    checkpoint_path(folder, 40).mkdir()  # not complete
    return folder


def test_the_files_have_the_names_that_training_gives_them(run: Path) -> None:
    folder = RunFolder(run)
    expected = {read.CONFIG: folder.config, read.STATS: folder.stats, read.LOCK: folder.lock_file}
    assert all(path == run / name for name, path in expected.items())
    assert folder.checkpoints == run / read.CHECKPOINTS and read.MARKER == MARKER


def test_all_of_a_run_is_read(run: Path) -> None:
    (found,) = read_snapshots([run], Queue(Slurm(("7", "RUNNING", "n[1-2]", "x"))), now=1010)
    assert found.state == State("training", 1000.0, 20, 100, 160, 4.0, "", "n1", "7")
    assert found.saved == Saved(20, 900, 12)
    assert found.recorded == (Recorded(10, 2.0, 4.0, False), Recorded(20, None, 4.0, True))
    assert (found.steps, found.log_every, found.checkpoint_every) == (100, 10, 20)
    assert found.owner is None and found.unreadable == () and found.free_bytes is not None
    assert (
        not isinstance(found.queue, Unseen) and found.queue is not None and found.queue["7"].hosts == ("n1", "n2")
    )
    where = standing(found)
    assert (where.word, where.job, where.step, where.ends) == ("training", "7", 20, 1000 + 80 * 2)
    text = as_text([found])
    assert text.startswith(f"{run}: training, healthy\n")
    assert "step          20 of 100 (20.0%), 10 s ago" in text and "last saved    step 20, 1 min 50 s ago" in text
    assert json.loads(json.dumps(as_data(found)))["expected_end"] == 1160


def test_slurm_is_not_asked_of_runs_that_no_job_trains(run: Path) -> None:
    (run / read.STATE).write_text(json.dumps({**STATE, "job": None}))
    (found,) = read_snapshots([run], Queue(no_queue), now=1010)
    assert found.queue is None and standing(found).word == "training"


def test_the_queue_is_asked_once_for_all_runs_and_each_gets_its_own_jobs(run: Path) -> None:
    other = run.with_name("b")
    shutil.copytree(run, other)
    (other / read.STATE).write_text(json.dumps({**STATE, "job": "8"}))
    # Submitted by hand: known by its name alone.
    by_hand = ("9", "PENDING", "", job_name(training_folder(run)))
    slurm = Slurm(("7", "TIMEOUT", "n1", "x"), ("8", "RUNNING", "n2", "y"), by_hand)
    first, second = read_snapshots([run, other], Queue(slurm), now=1010)
    assert [sorted(found.queue or {}) for found in (first, second)] == [["7", "9"], ["8"]]
    assert [standing(found).word for found in (first, second)] == ["pending", "training"]
    assert len(slurm.asked) == 2
    table = as_text([first, second])
    assert [line.split()[:4] for line in table.splitlines()[1:3]] == [
        [str(run), "pending", "waiting", "9"],
        [str(other), "training", "healthy", "8"],
    ]


def test_the_attempts_and_heartbeats_of_a_job_are_read(run: Path) -> None:
    folder = training_folder(run)
    record_submission(folder.path, "7", 800)
    record_start(folder.path, Attempt(1, "7", 0, ("n1",), 0, 850))
    Terms(1, {"start": 50, "step": 5, "save": 50, "evaluation": 50}, 0.1).write(folder.heartbeats)
    with Heart(folder.heartbeats, 0, 1) as heart:
        heart.beat("step", 20)
    (found,) = read_snapshots([run], Queue(Slurm(("7", "RUNNING", "n1", "x"))), now=1010)
    assert [attempt.number for attempt in found.record.attempts] == [1]
    assert found.terms.limits["step"] == 5
    (beat,) = found.heartbeats
    assert (beat.rank, beat.phase) == (0, "ended")
    assert "1: job 7 on n1 since" in as_text([found])


def test_evaluations_are_shown(run: Path) -> None:
    folder = evaluation_folder(run, ["evaluate", str(run)])
    folder.path.mkdir(parents=True)
    folder.job.write_text("{}")
    record_submission(folder.path, "8", 800)
    slurm = Slurm(("7", "RUNNING", "n1", "x"), ("8", "PENDING", "", "y"))
    (found,) = read_snapshots([run], Queue(slurm), now=1010)
    (other,) = found.others
    assert other.name == folder.path.name and [job.state for job in other.jobs] == ["PENDING"]
    assert f"{other.name}: job 8 PENDING" in as_text([found])
    assert standing(found).job == "7"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (read.STATE, b"{"),
        (read.STATE, b"[1]"),
        (read.STATE, b'{"state": "training"}'),
        (read.STATE, b'{"state": "training", "time": "now"}'),
        (read.CONFIG, b"train: [\n"),
        (read.CONFIG, b"- 1\n"),
        (read.CONFIG, b"train: {steps: many}\n"),
        (f"slurm/train/{attempts.ATTEMPTS}/", b""),
    ],
)
def test_a_damaged_file_is_named_and_the_others_are_read(run: Path, name: str, content: bytes) -> None:
    path = run / name
    if name.endswith("/"):
        path.mkdir(parents=True)
    else:
        path.write_bytes(content)
    (found,) = read_snapshots([run], Queue(Slurm()), now=1010)
    assert len(found.unreadable) == 1 and str(path) in found.unreadable[0]
    assert found.saved is not None and len(found.recorded) == 2


@pytest.mark.parametrize("content", [b"", b"{", b'{"files": 1}', b'{"files": {"a": {}}}'])
def test_a_checkpoint_with_a_damaged_marker_is_there_and_its_size_is_unknown(run: Path, content: bytes) -> None:
    (checkpoint_path(run, 20) / MARKER).write_bytes(content)
    saved = read.newest_saved(run)
    assert saved is not None and (saved.step, saved.bytes) == (20, None)


def test_a_folder_that_is_none_of_a_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="no run found"):
            read_snapshots([folder], Queue(no_queue))


def test_a_pipe_among_the_files_is_not_waited_for(run: Path) -> None:
    for name in (read.STATE, read.STATS, read.LOCK):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    (found,) = read_snapshots([run], Queue(no_queue), now=1010)
    assert found.state is None and found.recorded == () and len(found.unreadable) == 2


def test_runs_below_a_folder_are_found(run: Path, tmp_path: Path) -> None:
    inner = tmp_path / "runs/sweep/one"
    inner.mkdir(parents=True)
    shutil.copy(run / read.CONFIG, inner)
    (tmp_path / "runs/empty").mkdir()
    waiting = tmp_path / "runs/waiting"
    training_folder(waiting).path.mkdir(parents=True)
    assert runs_below(tmp_path / "runs") == [run, inner, waiting]
    assert runs_below(tmp_path / "absent") == []


HOLDER = """
import sys
from pathlib import Path
from ditmoe.launcher.training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_the_process_that_holds_a_run_is_seen(run: Path) -> None:
    """By its lock: a process that has its number and not its lock is another one."""
    assert read.read_owner(run) is None
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert read.read_owner(run) == Owner(holder.pid, socket.gethostname(), True)
        holder.communicate("\n", timeout=60)
    assert read.read_owner(run) == Owner(holder.pid, socket.gethostname(), False)
    lock: dict[str, Any] = json.loads((run / read.LOCK).read_text())
    (run / read.LOCK).write_text(json.dumps({**lock, "pid": os.getpid()}))
    assert read.read_owner(run) == Owner(os.getpid(), socket.gethostname(), False)
    (run / read.LOCK).write_text(json.dumps({**lock, "host": "elsewhere"}))
    assert read.read_owner(run) == Owner(holder.pid, "elsewhere", None)
    (run / read.LOCK).write_text("{}")
    assert read.read_owner(run) is None
