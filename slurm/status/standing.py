"""Where a run stands, from a snapshot: its own word, weighed against what the queue and its process say.

A run's own word is what was true when it was written. That it trains is believed only where a process or a job of
it is seen, or its files are fresh; what cannot be seen is `unknown`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from ditmoe.slurm.client import QueuedJob, Unseen
from ditmoe.slurm.status.snapshot import Snapshot

Word = Literal[
    "not started", "pending", "starting", "training", "complete", "stopped", "failed", "cut off", "unknown"
]
"""`cut off`: it had work to do, and nothing of it runs or waits."""

_RECORDS_MISSED: Final = 3

_OF_OUTCOME: Final[Mapping[str, Word]] = {
    "complete": "complete",
    "stopped": "stopped",
    "cancelled": "stopped",
    "failed": "failed",
    "hung": "failed",
    "node-check": "failed",
    "user-error": "failed",
    "no-progress": "failed",
    "cut-off": "cut off",
}
"""How an attempt ended → what the run is, when nothing follows."""


@dataclass(frozen=True)
class Whereabouts:
    """Whether anything of the run is seen now."""

    kind: Literal["running", "waiting", "gone", "unseen"]
    reason: str
    """Who is seen, or why nobody is."""
    job: QueuedJob | None = None


@dataclass(frozen=True)
class Standing:
    """Where a run stands. None: not known."""

    word: Word
    reason: str
    """Why; empty: it is as it should be."""
    job: str | None
    """That works on it, or waits, or did last."""
    queued: QueuedJob | None
    """The same, as the queue or the accounting has it."""
    step: int | None
    steps: int | None
    images_per_second: float | None
    ends: float | None
    """When its last step is expected, seconds since 1970."""

    @property
    def is_final(self) -> bool:
        """Whether nothing of it runs or waits, as far as can be seen."""
        return self.word in ("complete", "stopped", "failed", "cut off")


def standing(snapshot: Snapshot) -> Standing:
    """Where a run stands."""
    where = whereabouts(snapshot)
    word, reason = _word(snapshot, where)
    state, last = snapshot.state, snapshot.recorded[-1] if snapshot.recorded else None
    seen = [found.step for found in (state, last, snapshot.saved) if found is not None]
    step = next((step for step in seen if step is not None), None)
    steps = snapshot.steps if state is None or state.steps is None else state.steps
    speed = state.images_per_second if state is not None and word == "training" else None
    job = where.job.job if where.job else snapshot.jobs[-1] if snapshot.jobs else None
    return Standing(word, reason, job, where.job, step, steps, speed, _end(snapshot, word))


def last_written(snapshot: Snapshot) -> float | None:
    """When the run last said something of itself, or its attempt that runs began, if that is later."""
    times = [] if snapshot.state is None else [snapshot.state.time]
    if is_starting(snapshot):
        times.append(snapshot.record.attempts[-1].time)
    return max(times, default=None)


def is_starting(snapshot: Snapshot) -> bool:
    """Whether an attempt has begun and not yet said anything."""
    attempt = snapshot.record.attempts[-1] if snapshot.record.attempts else None
    if attempt is None or attempt.end is not None:
        return False
    return snapshot.state is None or snapshot.state.time < attempt.time


def quiet_seconds(snapshot: Snapshot) -> float:
    """How old state.json may be while all is well: it is written at the start, at records and at checkpoints."""
    seconds = step_seconds(snapshot)
    if seconds is None or snapshot.state is None or snapshot.state.state == "starting" or is_starting(snapshot):
        return snapshot.terms.limits["start"]
    interval = seconds * (snapshot.log_every or 1)
    return snapshot.terms.limits["step"] + _RECORDS_MISSED * interval


def step_seconds(snapshot: Snapshot) -> float | None:
    """Seconds of a step at the speed that the run last had; None: it has not said."""
    state = snapshot.state
    if state is None or not state.images_per_second or not state.step or not state.images:
        return None
    return state.images / state.step / state.images_per_second


def whereabouts(snapshot: Snapshot) -> Whereabouts:
    """Who works on the run, or waits to: its process on this machine, its jobs, or whoever writes its files."""
    owner, state = snapshot.owner, snapshot.state
    if owner is not None and owner.alive:
        return Whereabouts("running", f"process {owner.pid} on this machine", _running(snapshot))
    is_no_job = state is not None and state.job is None and is_fresh(snapshot)
    if snapshot.jobs and not is_no_job:
        return _of_jobs(snapshot)
    if owner is not None and owner.alive is False:
        return Whereabouts("gone", f"process {owner.pid} on this machine has ended")
    if state is None:
        queue = snapshot.queue
        return Whereabouts("unseen", queue.reason if isinstance(queue, Unseen) else "it has not said anything")
    if is_fresh(snapshot):
        return Whereabouts("running", f"its files, from {state.host or 'a machine unknown'}")
    place = f"host {state.host}" if state.host else "a host unknown"
    return Whereabouts(
        "unseen",
        f"it ran on {place}, which cannot be seen from here, and wrote nothing for {_ago(snapshot, state.time)}",
    )


def is_fresh(snapshot: Snapshot) -> bool:
    """Whether the run said lately that it works."""
    state = snapshot.state
    if state is None or state.state not in ("starting", "training"):
        return False
    return snapshot.now - state.time <= quiet_seconds(snapshot)


def _running(snapshot: Snapshot) -> QueuedJob | None:
    jobs = snapshot.queue.values() if isinstance(snapshot.queue, Mapping) else ()
    return next((job for job in jobs if job.state != "PENDING" and not job.has_ended), None)


def _of_jobs(snapshot: Snapshot) -> Whereabouts:
    """What is seen of a run that jobs of Slurm were to train."""
    newest, queue, accounts = snapshot.jobs[-1], snapshot.queue, snapshot.accounts
    known = {
        **(accounts if isinstance(accounts, Mapping) else {}),
        **(queue if isinstance(queue, Mapping) else {}),
    }
    job = _running(snapshot) or next((job for job in known.values() if not job.has_ended), None)
    if job is not None and job.state in ("PENDING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        return Whereabouts("waiting", job.reason or job.state, job)
    if job is not None:
        return Whereabouts("running", f"job {job.job}", job)
    ended = max(known.values(), key=lambda job: job.ends or 0, default=None)
    if ended is not None and (isinstance(queue, Mapping) or ended.job == newest):
        return Whereabouts("gone", f"job {ended.job} has ended: {ended.state}", ended)
    if isinstance(queue, Mapping) and not is_fresh(snapshot):
        return Whereabouts("gone", f"the queue does not have job {newest} any more")
    if isinstance(queue, Mapping):
        return Whereabouts("unseen", f"its files are fresh, but the queue here does not have job {newest}")
    problems = [problem.reason for problem in (queue, accounts) if isinstance(problem, Unseen)]
    if is_fresh(snapshot) and snapshot.state is not None:
        return Whereabouts("running", f"its files; {'; '.join(problems)}")
    return Whereabouts("unseen", "; ".join(problems) or "the queue was not asked")


def _word(snapshot: Snapshot, where: Whereabouts) -> tuple[Word, str]:
    """What the run is, and why."""
    state = snapshot.state
    own = state.state if state is not None else None
    if own == "complete":
        return "complete", ""
    if where.kind == "waiting":
        return "pending", where.reason
    if where.kind == "running":
        return ("training", "") if own == "training" and not is_starting(snapshot) else ("starting", "")
    ended = _of_last_attempt(snapshot)
    if where.kind == "gone":
        if own in ("stopped", "failed") and state is not None:
            return ("stopped", state.reason) if own == "stopped" else ("failed", state.reason)
        if _never_began(snapshot, where.job):
            return "stopped", where.reason
        return ended or ("cut off", where.reason)
    if own in ("stopped", "failed") and state is not None:
        follows = f"whether it is tried again is unknown: {where.reason}" if snapshot.jobs else ""
        reason = "; ".join(filter(None, (state.reason, follows)))
        return ("stopped", reason) if own == "stopped" else ("failed", reason)
    has_begun = snapshot.jobs or snapshot.saved is not None or snapshot.recorded
    if own is None and not has_begun and not isinstance(snapshot.queue, Unseen):
        return "not started", ""
    last = snapshot.record.attempts[-1] if snapshot.record.attempts else None
    if ended is not None and last is not None and last.end is not None and last.end.decision != "requeue":
        return ended
    return "unknown", where.reason


def _never_began(snapshot: Snapshot, job: QueuedJob | None) -> bool:
    """Whether somebody took a job out of the queue while it waited."""
    attempts = snapshot.record.attempts
    return job is not None and job.state == "CANCELLED" and all(attempt.job != job.job for attempt in attempts)


def _of_last_attempt(snapshot: Snapshot) -> tuple[Word, str] | None:
    """What the end of the last attempt makes of the run; None: there is no attempt, or it has not ended."""
    attempts = snapshot.record.attempts
    if not attempts or attempts[-1].end is None:
        return None
    end = attempts[-1].end
    return _OF_OUTCOME[end.outcome], end.reason


def _end(snapshot: Snapshot, word: Word) -> float | None:
    """When a run that trains is expected to have done its last step."""
    state, seconds = snapshot.state, step_seconds(snapshot)
    if word != "training" or state is None or seconds is None or state.steps is None or state.step is None:
        return None
    return state.time + max(0, state.steps - state.step) * seconds


def _ago(snapshot: Snapshot, time: float) -> str:
    return f"{max(0.0, snapshot.now - time):.0f} s"
