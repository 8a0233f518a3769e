"""Ends a run so that nothing is lost: it is asked for a checkpoint first, and jobs that wait leave the queue."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ditmoe.model.errors import UserError
from ditmoe.slurm.attempts import record_cancel
from ditmoe.slurm.client import Queue, QueuedJob, Unseen
from ditmoe.slurm.job_folder import job_folders, training_folder
from ditmoe.slurm.status.read import newest_saved, read_owner, read_snapshots
from ditmoe.slurm.status.snapshot import Snapshot
from ditmoe.slurm.status.standing import standing
from ditmoe.slurm.status.words import duration

_WAITING = ("PENDING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_LAST_WAIT = 120.0
"""Seconds in which Slurm ends a job for good."""


@dataclass
class _Patience:
    """How long a run has for its checkpoint."""

    seconds: float
    """After the first request; 0: it gets none."""
    poll: float
    """Seconds between two looks."""
    tell: Callable[[str], None]

    def __post_init__(self) -> None:
        self.start = time.monotonic()

    @property
    def passed(self) -> float:
        return time.monotonic() - self.start

    @property
    def is_over(self) -> bool:
        return self.passed >= self.seconds


def cancel_run(run: Path, queue: Queue, seconds: float, tell: Callable[[str], None], poll: float = 2.0) -> None:
    """End all that trains or evaluates a run, or waits to.

    Args:
        run: its folder.
        queue: of Slurm.
        seconds: that it has for its checkpoint; then it is ended without. 0: at once.
        tell: gets a line for each thing that happens.
        poll: seconds between two looks.

    Raises:
        UserError: it runs where it cannot be reached from here, the queue refuses, or something of it goes on.
    """
    (snapshot,) = read_snapshots([run], queue)
    patience = _Patience(seconds, poll, tell)
    live = _live(snapshot)
    local = snapshot.owner is not None and snapshot.owner.alive is True and not _running(live)
    if not live and not local:
        _nothing_seen(snapshot, tell)
        return
    for folder in job_folders(run):
        record_cancel(folder.path, time.time())
    if live:
        _end_jobs(run, queue, patience)
    if local:
        _end_process(run, patience)
    saved = newest_saved(run)
    tell(
        "no checkpoint was saved" if saved is None else f"step {saved.step:,} is saved; the run can go on after it"
    )


def _live(snapshot: Snapshot) -> dict[str, QueuedJob]:
    """All jobs of the run that have not ended: of its training, and of its evaluations."""
    if isinstance(snapshot.queue, Unseen):
        raise UserError(f"{snapshot.run}: its jobs were not seen: {snapshot.queue.problem}. Nothing was cancelled")
    jobs = dict(snapshot.queue or {})
    for other in snapshot.others:
        jobs |= {job.job: job for job in other.jobs}
    return {key: job for key, job in jobs.items() if not job.has_ended}


def _running(live: Mapping[str, QueuedJob]) -> bool:
    return any(job.state not in _WAITING for job in live.values())


def _nothing_seen(snapshot: Snapshot, tell: Callable[[str], None]) -> None:
    where = standing(snapshot)
    if where.word in ("starting", "training"):
        host = "another host" if snapshot.state is None else f"host {snapshot.state.host}"
        raise UserError(
            f"{snapshot.run}: {host} trains it, which cannot be reached from here; expected this command there"
        )
    if where.word == "unknown":
        raise UserError(f"{snapshot.run}: whether it runs cannot be seen: {where.reason}; nothing was cancelled")
    tell(f"nothing of it runs or waits: it is {where.word}{f' ({where.reason})' if where.reason else ''}")


def _end_jobs(run: Path, queue: Queue, patience: _Patience) -> None:
    """Ask each job that trains for a checkpoint, take those that wait out of the queue, and see them all end."""
    ending = _Ending(queue, patience, is_supervised=training_folder(run).job.is_file())
    while True:
        (snapshot,) = read_snapshots([run], queue)
        # A controller that does not answer for a while changes nothing of what was asked.
        if not isinstance(snapshot.queue, Unseen):
            live = _live(snapshot)
            ending.see_gone(live)
            if not live:
                return
            # Those that wait first: the end of the one that runs would let the next one start.
            for key, job in sorted(live.items(), key=lambda pair: pair[1].state not in _WAITING):
                ending.go_on(job, trains=key in (snapshot.queue or {}))
        if patience.passed > patience.seconds + _LAST_WAIT:
            raise UserError(f"{run}: {', '.join(ending.seen)}: Slurm was asked to end this job, and has not")
        time.sleep(patience.poll)


class _Ending:
    """What was asked of each job so far.

    Args:
        queue: of Slurm.
        patience: how long they have for a checkpoint.
        is_supervised: their batch script passes signals on, as that of `ditmoe submit` does; others end by one, so
            that their steps are asked instead.
    """

    def __init__(self, queue: Queue, patience: _Patience, is_supervised: bool) -> None:
        self._queue, self._patience, self._is_supervised = queue, patience, is_supervised
        self._asked: set[str] = set()
        self._cancelled: set[str] = set()
        self.seen: set[str] = set()

    def see_gone(self, live: Mapping[str, QueuedJob]) -> None:
        """Tell of jobs that have ended since the last look."""
        for job in sorted(self.seen - set(live)):
            self._patience.tell(f"job {job} has ended, after {duration(self._patience.passed)}")
        self.seen = set(live)

    def go_on(self, job: QueuedJob, trains: bool) -> None:
        """The next thing to ask of a job, once: a checkpoint, then its end."""
        if job.job in self._cancelled:
            return
        if job.state in _WAITING:
            self._cancel(job.job, f"waited ({job.reason or job.state}), and is taken out of the queue")
        elif not trains:
            self._cancel(job.job, "evaluates the run, and is ended")
        elif not self._patience.seconds:
            self._cancel(job.job, "is ended without a checkpoint")
        elif self._patience.is_over:
            self._cancel(job.job, f"goes on {duration(self._patience.seconds)} after the request, and is ended")
        elif job.job not in self._asked:
            _order(self._queue, job.job, self._queue.signal, job.job, "TERM", not self._is_supervised)
            self._asked.add(job.job)
            self._patience.tell(f"job {job.job} on {', '.join(job.hosts)} was asked to save a checkpoint and end")

    def _cancel(self, job: str, what: str) -> None:
        _order(self._queue, job, self._queue.cancel, job)
        self._cancelled.add(job)
        self._patience.tell(f"job {job} {what}")


def _order(queue: Queue, job: str, order: Callable[..., None], *arguments: object) -> None:
    """Give an order; that a job has ended meanwhile is no reason to complain."""
    try:
        order(*arguments)
    except UserError:
        jobs = queue.jobs([job])
        if isinstance(jobs, Unseen) or any(not found.has_ended for found in jobs.values()):
            raise


def _end_process(run: Path, patience: _Patience) -> None:
    """Ask the process of this machine that holds the run for a checkpoint, and see it end."""
    owner = read_owner(run)
    if owner is None or not owner.alive:
        return
    try:
        os.kill(owner.pid, signal.SIGTERM if patience.seconds else signal.SIGKILL)
    except PermissionError:
        raise UserError(f"{run}: process {owner.pid} is another user's; expected your own") from None
    except ProcessLookupError:
        return
    patience.tell(
        f"process {owner.pid} was {'asked for a checkpoint and its end' if patience.seconds else 'killed'}"
    )
    while (now := read_owner(run)) is not None and now.alive and now.pid == owner.pid:
        if patience.passed > patience.seconds + _LAST_WAIT * (not patience.seconds):
            raise UserError(
                f"{run}: process {owner.pid} still holds it after {duration(patience.passed)};"
                " wait for its checkpoint, or repeat with --now to end it without"
            )
        time.sleep(min(patience.poll, 0.5))
    patience.tell(f"process {owner.pid} has let go of the run after {duration(patience.passed)}")
