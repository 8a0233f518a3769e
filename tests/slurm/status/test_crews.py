"""What is known of the workers of a crew, and their end, with a queue of this process."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ditmoe.data.storage.claims import Claims
from ditmoe.model.errors import UserError
from ditmoe.slurm.attempts import Attempt, End, read_attempts, record_end, record_start, record_submission
from ditmoe.slurm.client import Queue, QueuedJob, Unseen
from ditmoe.slurm.heartbeats import Heart, Terms
from ditmoe.slurm.job_folder import JobFolder, tally_of, workers_at, workers_folder, workers_folders
from ditmoe.slurm.status.crews import (
    LEADER_CLAIM,
    CrewSnapshot,
    cancel_workers,
    crew_data,
    crew_output,
    crew_text,
    crews_below,
    is_crew,
    read_crew,
)


class OwnQueue(Queue):
    """Jobs in memory."""

    def __init__(self, *jobs: QueuedJob) -> None:
        super().__init__()
        self.known = {job.job: job for job in jobs}
        self.answers = True
        self.ends = True

    def jobs(self, jobs: Sequence[str]) -> dict[str, QueuedJob] | Unseen:
        return {job: self.known[job] for job in jobs if job in self.known} if self.answers else Unseen("no answer")

    def cancel(self, job: str) -> None:
        if self.known[job].has_ended:
            raise UserError("scancel: error: it has ended")
        if self.ends:
            self.known[job] = replace(self.known[job], state="CANCELLED")


def running(job: str, *hosts: str) -> QueuedJob:
    return QueuedJob(job, "RUNNING", "", hosts, 1.0, 2.0, None)


def submitted(crew: Path, number: int, job: str, attempt: int | None = None) -> JobFolder:
    folder = workers_folder(crew, number)
    folder.path.mkdir(parents=True)
    record_submission(folder.path, job, 1.0)
    if attempt is not None:
        record_start(folder.path, Attempt(attempt, job, 0, ("n1", "n2"), 0, 2.0))
    return folder


def once_it_beats(crew: Path, queue: Queue) -> CrewSnapshot:
    """Once the thread of a heart has written."""
    end = time.monotonic() + 30
    while True:
        found = read_crew(crew, queue)
        if any(beat.phase == "step" for job in found.jobs for beat in job.heartbeats):
            return found
        assert time.monotonic() < end
        time.sleep(0.02)


def test_jobs_of_workers_with_parts_and_what_their_nodes_do(tmp_path: Path) -> None:
    crew = tmp_path / "runs" / "crew"
    first, second = submitted(crew, 2, "11", 1), submitted(crew, 10, "12")
    (crew / "slurm" / "workers-x").mkdir()
    assert [folder.path.name for folder in workers_folders(crew)] == ["workers-2", "workers-10"]
    assert is_crew(crew) and is_crew(first.path) and not is_crew(crew / "slurm") and not is_crew(tmp_path)
    assert workers_at(second.path) == second and workers_at(crew / "slurm" / "workers-11") is None
    assert crews_below(tmp_path / "runs") == [crew] and crews_below(tmp_path / "absent") == []
    tally_of(first.path, 0).write_bytes(b"....")
    tally_of(first.path, 1).write_bytes(b"...")
    Terms(1, {"start": 10, "step": 20}).write(first.heartbeats)
    queue = OwnQueue(running("11", "n1", "n2"), QueuedJob("12", "PENDING", "Priority", (), 1.0, None, None))
    with Heart(first.heartbeats, 0, 2) as heart, Claims(crew).taken(LEADER_CLAIM):
        heart.beat("step", doing="works for tls://n3:1")
        found = once_it_beats(crew, queue)
        lines = crew_text(found).splitlines()
        assert lines[0].endswith("leads it") and "process" in lines[0]
        assert lines[1] == "  workers-2   job 11 RUNNING on n1, n2; 7 parts made"
        assert lines[2].startswith("    rank 0 (") and lines[2].endswith("): works for tls://n3:1")
        assert lines[3] == "  workers-10  job 12 PENDING (Priority); 0 parts made"
        late = replace(found, now=found.now + 3000)
        assert "problem: no sign for" in crew_text(late) and "expected one within 20 s" in crew_text(late)
        data = json.loads(json.dumps(crew_data(found)))
        assert [job["parts"] for job in data["jobs"]] == [7, 0] and data["unseen"] is None
    assert not found.is_final
    assert [job.folder for job in read_crew(second.path, queue).jobs] == [second]


def test_what_has_ended_and_what_is_not_seen(tmp_path: Path) -> None:
    folder = submitted(tmp_path, 1, "11", 1)
    end = End("complete", "the program completed its work", 0, 5, ("n1",), (), (), "done", 3.0)
    record_end(folder.path, 1, end)
    queue = OwnQueue(replace(running("11"), state="COMPLETED"))
    found = read_crew(tmp_path, queue)
    assert found.is_final
    assert crew_text(found).splitlines() == [
        f"{tmp_path}: nobody leads it",
        "  workers-1   complete: the program completed its work; 0 parts made",
    ]
    queue.answers = False
    found = read_crew(tmp_path, queue)
    assert not found.is_final and crew_text(found).endswith("  warning: no answer")
    with pytest.raises(UserError, match="no output of workers found; expected a job that has begun"):
        crew_output(tmp_path)
    folder.output("11").write_text("hello\n")
    assert crew_output(tmp_path) == crew_output(folder.path) == folder.output("11")


def test_a_cancelled_job_is_on_record_so_that_it_does_not_come_back(tmp_path: Path) -> None:
    first, second = submitted(tmp_path, 1, "11", 1), submitted(tmp_path, 2, "12", 1)
    queue, told = OwnQueue(running("11", "n1"), running("12", "n2")), list[str]()
    cancel_workers(second.path, queue, told.append, poll=0)
    assert told == ["job 12 (workers-2) has ended"] and not queue.known["11"].has_ended
    assert read_attempts(second.path).cancelled == {"12"} and not read_attempts(first.path).cancelled
    cancel_workers(tmp_path, queue, told.append, poll=0)
    assert told[1:] == ["job 11 (workers-1) has ended"] and read_attempts(first.path).cancelled == {"11"}
    cancel_workers(tmp_path, queue, told.append, poll=0)
    assert told[2:] == ["no job of it waits or runs"]


def test_a_job_that_was_cancelled_before_it_began_says_so(tmp_path: Path) -> None:
    folder, queue = submitted(tmp_path, 1, "11"), OwnQueue(running("11"))
    cancel_workers(folder.path, queue, print, poll=0)
    assert crew_text(read_crew(tmp_path, queue)).splitlines()[1] == (
        "  workers-1   cancelled before it began; 0 parts made"
    )


def test_a_queue_that_does_not_answer_or_obey_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(tmp_path, 1, "11")
    queue = OwnQueue(running("11", "n1"))
    queue.answers = False
    with pytest.raises(UserError, match=r"its jobs were not seen: no answer\. Nothing was cancelled"):
        cancel_workers(tmp_path, queue, print)
    queue.answers, queue.ends = True, False
    monkeypatch.setattr("ditmoe.slurm.status.crews._LAST_WAIT", 0.05)
    with pytest.raises(UserError, match="11: Slurm was asked to end this job, and has not"):
        cancel_workers(tmp_path, queue, print, poll=0.02)
