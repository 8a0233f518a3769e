"""The jobs of a crew's workers: what is known of them, and their end."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from ditmoe.data.storage.claims import Claims
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted, printable
from ditmoe.slurm.attempts import Record, read_attempts, record_cancel
from ditmoe.slurm.client import Queue, QueuedJob, Unseen
from ditmoe.slurm.heartbeats import Heartbeat, Terms, read_heartbeats, read_terms
from ditmoe.slurm.job_folder import JobFolder, parts_made, workers_at, workers_folders
from ditmoe.slurm.status.words import duration

LEADER_CLAIM: Final = "scheduler"
"""In the crew's folder: held by whoever leads it."""
_LAST_WAIT: Final = 120.0
"""Seconds in which Slurm ends a job for good."""


@dataclass(frozen=True)
class WorkersJob:
    """A job folder of workers."""

    folder: JobFolder
    record: Record
    jobs: tuple[QueuedJob, ...]
    """Its jobs that the queue has."""
    parts: int
    """That its workers have made."""
    terms: Terms = field(default_factory=Terms)
    heartbeats: tuple[Heartbeat, ...] = ()
    """Of the ranks, each of which keeps the workers of a node, of the attempt that runs."""

    @property
    def live(self) -> tuple[QueuedJob, ...]:
        """Its jobs that wait or run."""
        return tuple(job for job in self.jobs if not job.has_ended)

    @property
    def outcome(self) -> str:
        """How its last attempt ended, or that it was cancelled before it had one; empty: neither."""
        if not self.record.attempts:
            jobs = {submission.job for submission in self.record.submissions}
            return "cancelled before it began" if jobs and jobs <= self.record.cancelled else ""
        end = self.record.attempts[-1].end
        return "" if end is None else f"{end.outcome}: {end.reason}"


@dataclass(frozen=True)
class CrewSnapshot:
    """What is known of a crew at one moment."""

    folder: Path
    now: float
    leader: str | None
    """Who leads it, for people to read; None: nobody."""
    jobs: tuple[WorkersJob, ...]
    unseen: str
    """Why the queue did not answer; empty: it did."""

    @property
    def is_final(self) -> bool:
        """Whether no job of it runs or waits, as far as can be seen."""
        return not self.unseen and not any(job.live for job in self.jobs)


def is_crew(place: Path) -> bool:
    """Whether a folder is that of a crew which workers were submitted for, or one of the jobs of its workers."""
    return bool(workers_folders(place)) or workers_at(place) is not None


def crews_below(folder: Path) -> list[Path]:
    """The crews in a folder, by name."""
    try:
        return [path for path in sorted(folder.iterdir()) if not path.is_symlink() and workers_folders(path)]
    except OSError:
        return []


def read_crew(place: Path, queue: Queue, now: float | None = None) -> CrewSnapshot:
    """What is known of a crew, or of one job of its workers. UserError where its records cannot be read."""
    one = workers_at(place)
    folders = workers_folders(place) if one is None else [one]
    crew = place if one is None else place.parent.parent
    records = [read_attempts(folder.path) for folder in folders]
    listed = queue.jobs([submission.job for record in records for submission in record.submissions])
    found: Mapping[str, QueuedJob] = {} if isinstance(listed, Unseen) else listed
    return CrewSnapshot(
        folder=place,
        now=time.time() if now is None else now,
        leader=Claims(crew).holder(LEADER_CLAIM),
        jobs=tuple(_job(folder, record, found) for folder, record in zip(folders, records, strict=True)),
        unseen=listed.problem if isinstance(listed, Unseen) else "",
    )


def _job(folder: JobFolder, record: Record, listed: Mapping[str, QueuedJob]) -> WorkersJob:
    ids = dict.fromkeys(submission.job for submission in record.submissions)
    attempt, beats = record.attempts[-1] if record.attempts else None, dict[int, Heartbeat]()
    if attempt is not None and attempt.end is None:
        try:
            beats = read_heartbeats(folder.heartbeats, attempt.number)
        except OSError:
            beats = {}  # not there yet, or a folder that does not answer: the queue says more
    return WorkersJob(
        folder=folder,
        record=record,
        jobs=tuple(listed[job] for job in ids if job in listed),
        parts=parts_made(folder.path),
        terms=read_terms(folder.heartbeats),
        heartbeats=tuple(beats[rank] for rank in sorted(beats)),
    )


def crew_text(snapshot: CrewSnapshot) -> str:
    """All that is known of a crew, in lines."""
    leads = "nobody leads it" if snapshot.leader is None else f"{snapshot.leader} leads it"
    lines = [f"{printable(snapshot.folder)}: {printable(leads)}"]
    for job in snapshot.jobs:
        lines.append(
            f"  {job.folder.path.name:<11} {printable(_where(job, snapshot))}; {counted(job.parts, 'part')} made"
        )
        lines += [f"    {printable(_rank(job, beat, snapshot.now))}" for beat in job.heartbeats]
    return "\n".join([*lines, *([f"  warning: {printable(snapshot.unseen)}"] if snapshot.unseen else [])])


def crew_data(snapshot: CrewSnapshot) -> dict[str, Any]:
    """What is known of a crew, as plain data: times are seconds since 1970, null is not known."""
    return {
        "crew": str(snapshot.folder),
        "time": snapshot.now,
        "leader": snapshot.leader,
        "unseen": snapshot.unseen or None,
        "jobs": [
            {
                "name": job.folder.path.name,
                "jobs": [asdict(each) for each in job.jobs],
                "parts": job.parts,
                "attempts": [asdict(attempt) for attempt in job.record.attempts],
                "ranks": [asdict(beat) for beat in job.heartbeats],
            }
            for job in snapshot.jobs
        ],
    }


def _where(job: WorkersJob, snapshot: CrewSnapshot) -> str:
    """Where a job stands in the queue, or how it ended."""
    words = [
        f"job {each.job} {each.state}{f' ({each.reason})' if each.reason else ''}"
        + (f" on {', '.join(each.hosts)}" if each.hosts else "")
        for each in job.live
    ]
    if words:
        return ", ".join(words)
    return job.outcome or ("unknown" if snapshot.unseen else "not begun, or ended unseen")


def _rank(job: WorkersJob, beat: Heartbeat, now: float) -> str:
    """What the workers of a node do; that they are silent, where they are for longer than they may be."""
    limit, quiet = job.terms.limits.get(beat.phase), now - beat.since
    silent = beat.phase != "ended" and limit is not None and quiet > limit
    problem = f"; problem: no sign for {duration(quiet)}, expected one within {duration(limit or 0)}"
    return f"rank {beat.rank} ({beat.host}): {beat.doing or beat.phase}{problem if silent else ''}"


def crew_output(place: Path) -> Path:
    """What the workers' job printed that printed last. UserError where none has."""
    one = workers_at(place)
    folders = workers_folders(place) if one is None else [one]
    outputs = [path for folder in folders for path in folder.path.glob("output-*.txt")]
    if not outputs:
        raise UserError(f"{place}: no output of workers found; expected a job that has begun")
    return max(outputs, key=lambda path: path.stat().st_mtime)


def cancel_workers(place: Path, queue: Queue, tell: Callable[[str], None], poll: float = 2.0) -> None:
    """End the workers of a crew, or those of one job, for good. What they were making is made by others.

    Args:
        place: the crew's folder, or one of its job folders.
        queue: of Slurm.
        tell: gets a line for each thing that happens.
        poll: seconds between two looks.

    Raises:
        UserError: the queue does not say which there are, or does not end them.
    """
    deadline, seen, ordered = time.monotonic() + _LAST_WAIT, dict[str, str](), set[str]()
    while True:
        snapshot = read_crew(place, queue)
        if snapshot.unseen and not seen:
            raise UserError(f"{place}: its jobs were not seen: {snapshot.unseen}. Nothing was cancelled")
        live = {each.job: job for job in snapshot.jobs for each in job.live}
        if not snapshot.unseen:
            for gone in sorted(seen.keys() - live.keys()):
                tell(f"job {gone} ({seen.pop(gone)}) has ended")
        if snapshot.is_final:
            if not ordered:
                tell("no job of it waits or runs")
            return
        _order(live, ordered, queue)
        seen |= {job: of.folder.path.name for job, of in live.items()}
        if time.monotonic() > deadline:
            raise UserError(f"{place}: {', '.join(seen)}: Slurm was asked to end this job, and has not")
        time.sleep(poll)


def _order(live: Mapping[str, WorkersJob], ordered: set[str], queue: Queue) -> None:
    """Ask for the end of each job once."""
    wanted: Sequence[str] = sorted(live.keys() - ordered)
    for folder in {live[job].folder.path for job in wanted}:
        record_cancel(folder, time.time())
    for job in wanted:
        try:
            queue.cancel(job)
        except UserError:
            found = queue.jobs([job])  # that it has ended meanwhile is no reason to complain
            if isinstance(found, Unseen) or any(not each.has_ended for each in found.values()):
                raise
        ordered.add(job)
