"""Handing a job in, with a queue of this process: one job at a time, and nothing half-written counts."""

import json
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ditmoe.model.errors import UserError
from ditmoe.slurm.attempts import read_attempts
from ditmoe.slurm.client import Queue, QueuedJob, Unseen
from ditmoe.slurm.job_folder import read_job
from ditmoe.slurm.submission import snapshot
from ditmoe.slurm.submission import submit as module
from ditmoe.slurm.submission.script import Request, render
from ditmoe.slurm.submission.settings import JobSettings
from ditmoe.slurm.submission.snapshot import COMMIT
from ditmoe.slurm.submission.submit import forget_other_jobs, never_starting, script_of, submit
from tests.slurm.submission.golden import request


class Killed(BaseException):
    """As SIGKILL: nothing in the program takes notice."""


class OwnQueue(Queue):
    """A queue in memory, which keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, QueuedJob] = {}
        self.scripts: list[str] = []
        self.refuses_after = 1000

    def named(self, *names: str) -> dict[str, QueuedJob] | Unseen:
        return dict(self.known)

    def submit(self, script: Path, options: Sequence[str] = (), arguments: Sequence[str] = ()) -> str:
        if len(self.scripts) >= self.refuses_after:
            raise UserError("sbatch: error: invalid partition specified")
        self.scripts.append(script.read_text())
        job = str(len(self.scripts))
        self.known[job] = QueuedJob(job, "PENDING", "Priority", (), 1.0, None, None)
        return job

    def end(self) -> None:
        self.known = {key: replace(job, state="COMPLETED") for key, job in self.known.items()}


@pytest.fixture(autouse=True)
def _little_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying all of the program takes a second, and is tested elsewhere."""
    monkeypatch.setattr(snapshot, "PARTS", ("configs", "slurm"))


@pytest.fixture
def queue() -> OwnQueue:
    return OwnQueue()


def asked(tmp_path: Path, **values: Any) -> Request:
    return request(run=str(tmp_path / "run"), **values)


def test_a_job_is_whole_when_it_is_handed_in(tmp_path: Path, queue: OwnQueue) -> None:
    made = asked(tmp_path, nodes=2)
    assert submit(made, queue, "seed: 1\n", private=True) == ["1"]
    folder = made.folder
    assert queue.scripts == [render(made)] and folder.script == tmp_path / "run" / "submit.sbatch"
    assert read_job(folder) == made.job
    assert folder.config.read_text() == "seed: 1\n" and stat.S_IMODE(folder.config.stat().st_mode) == 0o600
    assert sorted(path.name for path in (folder.code / "ditmoe").iterdir()) == ["__init__.py", "configs", "slurm"]
    assert "commit" in json.loads((folder.code / COMMIT).read_text())
    assert [each.job for each in read_attempts(folder.path).submissions] == ["1"]


def test_a_second_job_is_refused_while_the_first_waits_or_runs(tmp_path: Path, queue: OwnQueue) -> None:
    made = asked(tmp_path)
    submit(made, queue, "seed: 1\n")
    with pytest.raises(UserError, match=r"train: job 1 is PENDING \(Priority\); expected none in the queue"):
        submit(made, queue, "seed: 2\n")
    queue.known["1"] = replace(queue.known["1"], state="COMPLETING", reason="", hosts=("n1", "n2"))
    with pytest.raises(UserError, match="job 1 is COMPLETING on n1, n2; expected none"):
        submit(made, queue, "seed: 2\n")
    assert made.folder.config.read_text() == "seed: 1\n"
    queue.end()
    assert submit(made, queue, "seed: 2\n") == ["2"]


def test_a_queue_that_does_not_answer_is_not_an_empty_one(tmp_path: Path, queue: OwnQueue) -> None:
    queue.named = lambda *names: Unseen("squeue gave no answer within 30 s")  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"seen: squeue gave no answer within 30 s\. Nothing was"):
        submit(asked(tmp_path), queue)
    assert not (tmp_path / "run").exists() and not queue.scripts


def test_two_at_the_same_moment(tmp_path: Path, queue: OwnQueue) -> None:
    made = asked(tmp_path)
    made.folder.path.mkdir(parents=True)
    with module._alone(made.folder.path), pytest.raises(UserError, match="another process submits it"):
        submit(made, queue)
    assert submit(made, queue) == ["1"]


def test_a_chain_is_recorded_job_by_job(tmp_path: Path, queue: OwnQueue) -> None:
    made = asked(tmp_path, chain=3)
    assert submit(made, queue) == ["1", "2", "3"]
    assert [each.job for each in read_attempts(made.folder.path).submissions] == ["1", "2", "3"]


def test_a_chain_of_which_slurm_takes_a_part(tmp_path: Path, queue: OwnQueue) -> None:
    queue.refuses_after = 2
    made = asked(tmp_path, chain=3)
    with pytest.raises(UserError, match=r"invalid partition specified \(of the chain it has taken 1, 2\)"):
        submit(made, queue)
    assert [each.job for each in read_attempts(made.folder.path).submissions] == ["1", "2"]


def whole(made: Request, text: str) -> bool:
    """Whether the job folder holds one submission and nothing of another."""
    folder = made.folder
    return (
        folder.script.read_text() == render(made)
        and read_job(folder) == made.job
        and folder.config.read_text() == text
        and (folder.code / COMMIT).exists()
    )


def test_killed_anywhere_and_repeated(tmp_path: Path, queue: OwnQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second submission of a run is killed at each step; what can be started is always of one submission."""
    before, after = asked(tmp_path, nodes=1), asked(tmp_path, nodes=2)
    steps = 0
    kill_at = 10**9

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps >= kill_at:
                raise Killed
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "write_bytes", counted(Path.write_bytes))
    monkeypatch.setattr(OwnQueue, "submit", counted(OwnQueue.submit))
    monkeypatch.setattr(module, "record_submission", counted(module.record_submission))
    submit(before, queue, "seed: 1\n")
    in_all = steps
    queue.end()
    handed_in = 0
    for at in [1, 2, in_all // 2, *range(in_all - 7, in_all + 1)]:
        steps, kill_at = 0, at
        with pytest.raises(Killed):
            submit(after, queue, "seed: 2\n")
        kill_at = 10**9
        script = after.folder.script
        if script.exists():
            assert whole(after, "seed: 2\n")
        waiting = [job for job in queue.known.values() if not job.has_ended]
        if waiting:  # killed between Slurm's answer and the record of it
            handed_in += 1
            with pytest.raises(UserError, match="is PENDING"):
                submit(after, queue, "seed: 2\n")
        else:
            submit(after, queue, "seed: 2\n")
        assert whole(after, "seed: 2\n")
        assert len([job for job in queue.known.values() if not job.has_ended]) == 1
        queue.end()
        submit(before, queue, "seed: 1\n")
        queue.end()
    assert handed_in == 1


def test_a_preamble_that_is_no_shell_is_told(tmp_path: Path) -> None:
    for preamble in ("if true", "cat <<END", "echo 'x"):
        with pytest.raises(UserError, match=r"preamble of the site file: bash does not take it: .*line"):
            script_of(asked(tmp_path, preamble=preamble))
    script_of(asked(tmp_path, preamble="if true; then\n\techo 'x'\nfi"))


def test_what_another_job_left_in_the_environment_is_forgotten() -> None:
    kept = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_RESERVATION": "r", "SBATCH_QOS": "q"}
    foreign = {"SLURM_JOB_ID": "7", "SLURM_CPU_BIND": "x", "RANK": "0", "WORLD_SIZE": "1", "DITMOE_MEETING": "m"}
    decided = {"SBATCH_PARTITION": "p", "SBATCH_TIMELIMIT": "5", "SBATCH_EXPORT": "NONE", "SRUN_DEBUG": "3"}
    environment = {**kept, **foreign, **decided}
    forget_other_jobs(environment, JobSettings(partition="own", time="9"))
    assert environment == kept


def test_what_the_queue_will_not_start_is_told_at_once(queue: OwnQueue) -> None:
    """Slurm takes a job that is too large for its partition, and lets it wait for ever."""
    waiting = QueuedJob("1", "PENDING", "PartitionNodeLimit", (), 1.0, None, None)
    others = {
        "2": replace(waiting, job="2", reason="Priority"),
        "3": replace(waiting, job="3", state="RUNNING", reason=""),
        "4": replace(waiting, job="4", reason="Dependency"),
    }
    answers = [{"1": replace(waiting, reason="")}, {"1": waiting, **others}]  # its scheduler has to look first
    queue.jobs = lambda jobs: answers.pop(0)  # type: ignore[method-assign]
    (line,) = never_starting(queue, ["1", "2", "3", "4"])
    assert line.startswith("job 1 does not start by itself: Slurm's reason is PartitionNodeLimit; expected nodes")
    queue.jobs = lambda jobs: Unseen("squeue gave no answer")  # type: ignore[method-assign]
    assert never_starting(queue, ["1"]) == []
