"""What is wrong with a run, or soon will be: pure functions over a snapshot, each of which looks for one fault."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Final, Literal

from ditmoe.model.outside.text import counted
from ditmoe.slurm.client import Unseen
from ditmoe.slurm.status.snapshot import Recorded, Snapshot
from ditmoe.slurm.status.standing import Standing, last_written, quiet_seconds, standing, step_seconds
from ditmoe.slurm.status.words import duration, size

Severity = Literal["problem", "warning", "note"]
"""Somebody must act; somebody should look; worth knowing."""
Health = Literal["healthy", "warning", "problem", "waiting", "ended", "unknown"]

CHECKPOINTS_MISSED: Final = 2
"""A checkpoint is late when the last one is older than so many intervals, and `SAVE_SECONDS`."""
SAVE_SECONDS: Final = 600.0
"""That writing a checkpoint may take."""
SLOW_SHARE: Final = 0.7
"""Of the speed before: images per second below it are a drop."""
_LATELY: Final = 3
"""Records whose speed is compared with that of the ones before them."""
_FEWEST_BEFORE: Final = 5
_CHECKPOINTS_THAT_FIT: Final = 2
"""A new checkpoint is written before an old one is removed."""
_LEAST_FREE_BYTES: Final = 2**30
_NAMED: Final = 8
"""Ranks that a finding lists."""
_FRUITLESS: Final = 2
"""Attempts in a row without progress."""


@dataclass(frozen=True)
class Finding:
    """One fault."""

    kind: str
    """Names the detector: `stalled`, `checkpoint-late`, …"""
    severity: Severity
    text: str


def silent_ranks(snapshot: Snapshot, where: Standing) -> Finding | None:
    """Ranks that have not got further for longer than what they are in may take.

    Ranks wait for one another: to blame are those that are furthest behind, and the others have no limit.
    """
    working = [heartbeat for heartbeat in snapshot.heartbeats if heartbeat.phase != "ended"]
    if where.word not in ("starting", "training") or not working:
        return None
    fewest = min(heartbeat.beats for heartbeat in working)
    limits = snapshot.terms.limits
    late = [
        heartbeat
        for heartbeat in working
        if heartbeat.beats == fewest and snapshot.now - heartbeat.since > limits[heartbeat.phase]
    ]
    if not late:
        return None
    names = ", ".join(f"rank {heartbeat.rank} ({heartbeat.host})" for heartbeat in late[:_NAMED])
    more = f" and {len(late) - _NAMED} more" if len(late) > _NAMED else ""
    first = min(late, key=lambda heartbeat: heartbeat.since)
    return Finding(
        "stalled",
        "problem",
        f"no progress of {names}{more} in `{first.phase}` for {duration(snapshot.now - first.since)}; expected"
        f" some within {duration(limits[first.phase])}",
    )


def stalled(snapshot: Snapshot, where: Standing) -> Finding | None:
    """A run that is said to work, and writes nothing; where its ranks are watched, they say more."""
    written = None if snapshot.heartbeats else last_written(snapshot)
    if where.word not in ("starting", "training") or written is None:
        return None
    allowed, passed = quiet_seconds(snapshot), snapshot.now - written
    if passed <= allowed:
        return None
    return Finding(
        "stalled",
        "problem",
        f"the run has written nothing for {duration(passed)}; expected a sign of it within {duration(allowed)}",
    )


def checkpoint_late(snapshot: Snapshot, where: Standing) -> Finding | None:
    """A run whose last checkpoint is much older than the interval between two."""
    seconds, every = step_seconds(snapshot), snapshot.checkpoint_every
    if where.word != "training" or seconds is None or every is None or where.step is None:
        return None
    began = [attempt.time for attempt in snapshot.record.attempts[-1:]]
    since = max([*began, *([snapshot.saved.time] if snapshot.saved else [])], default=None)
    done = where.step - (snapshot.saved.step if snapshot.saved else 0)
    allowed = CHECKPOINTS_MISSED * every * seconds + SAVE_SECONDS
    too_many = done > CHECKPOINTS_MISSED * every
    too_old = since is not None and snapshot.now - since > allowed
    if not too_many and not too_old:
        return None
    last = (
        f"the last checkpoint is that of step {snapshot.saved.step}"
        if snapshot.saved
        else "there is no checkpoint"
    )
    age = f", {duration(snapshot.now - snapshot.saved.time)} old" if snapshot.saved else ""
    return Finding(
        "checkpoint-late",
        "problem",
        f"{last}{age}; the run is at step {where.step}, and saves every {counted(every, 'step')}, which take"
        f" {duration(every * seconds)}",
    )


def slower(snapshot: Snapshot, where: Standing) -> Finding | None:
    """Images per second far below what they were."""
    speeds = [record.images_per_second for record in snapshot.recorded if record.images_per_second]
    before, lately = speeds[:-_LATELY], speeds[-_LATELY:]
    if where.word != "training" or len(before) < _FEWEST_BEFORE:
        return None
    usual, now = median(before), median(lately)
    if now >= SLOW_SHARE * usual:
        return None
    return Finding("slower", "warning", f"{now:,.1f} images/s lately, {usual:,.1f} before")


def fruitless(snapshot: Snapshot, where: Standing) -> Finding | None:
    """Attempts in a row that brought no new checkpoint."""
    ended = [attempt for attempt in snapshot.record.attempts if attempt.end is not None]
    row = []
    for attempt in reversed(ended):
        assert attempt.end is not None
        if attempt.end.outcome == "complete" or (attempt.step or 0) < (attempt.end.step or 0):
            break
        row.append(attempt.end.reason)
    if where.word == "complete" or len(row) < _FRUITLESS:
        return None
    return Finding(
        "no-progress",
        "problem",
        f"the last {len(row)} attempts brought no new checkpoint; the last one ended so: {row[0]}",
    )


def loss_not_finite(snapshot: Snapshot, where: Standing) -> Finding | None:
    """A record whose loss is no number."""
    bad = [record for record in snapshot.recorded if _has_bad_loss(record)]
    if not bad:
        return None
    return Finding(
        "loss-not-finite", "problem", f"the loss of the record at step {bad[-1].step} is no finite number"
    )


def _has_bad_loss(record: Recorded) -> bool:
    return record.loss is None and not record.skipped


def disk_full(snapshot: Snapshot, where: Standing) -> Finding | None:
    """A disk on which the next checkpoints do not fit."""
    if snapshot.free_bytes is None or where.word in ("complete", "stopped"):
        return None
    size_of_one = snapshot.saved.bytes if snapshot.saved else None
    needed = max(_LEAST_FREE_BYTES, _CHECKPOINTS_THAT_FIT * (size_of_one or 0))
    if snapshot.free_bytes >= needed:
        return None
    cause = f"a checkpoint has {size(size_of_one)}" if size_of_one else f"at least {size(needed)} are expected"
    return Finding("disk-full", "problem", f"the run's disk has {size(snapshot.free_bytes)} free; {cause}")


def never_starts(snapshot: Snapshot, where: Standing) -> Finding | None:
    """A job that the queue will not start by itself."""
    if where.word != "pending" or where.queued is None:
        return None
    if not where.queued.never_starts:
        return None
    return Finding(
        "never-starts",
        "problem",
        f"job {where.queued.job} does not start by itself: Slurm's reason is {where.queued.reason}",
    )


def cut_off(snapshot: Snapshot, where: Standing) -> Finding | None:
    """A run that has work to do, and that nobody does."""
    if where.word != "cut off":
        return None
    return Finding(
        "cut-off",
        "problem",
        f"nothing trains it and nothing waits to ({where.reason}); repeat its command to resume",
    )


def not_seen(snapshot: Snapshot, where: Standing) -> Finding | None:
    """A run of which nobody here can say whether it lives."""
    if where.word != "unknown":
        return None
    return Finding("unknown", "warning", f"whether it runs cannot be seen: {where.reason}")


def queue_not_seen(snapshot: Snapshot, where: Standing) -> Finding | None:
    """A queue that does not answer, while a job may wait or run in it."""
    if not isinstance(snapshot.queue, Unseen) or where.word in ("complete", "unknown"):
        return None
    return Finding("queue-unseen", "note", f"the queue was not seen: {snapshot.queue.reason}")


def damaged_files(snapshot: Snapshot, where: Standing) -> Finding | None:
    """Files that are there and could not be read."""
    problems = list(snapshot.unreadable)
    if snapshot.record.damaged:
        lines = ", ".join(map(str, snapshot.record.damaged))
        problems.append(f"attempts.jsonl: damaged lines, as of a writer that was killed: {lines}")
    return Finding("unreadable", "warning", "; ".join(problems)) if problems else None


def lasts_longer(snapshot: Snapshot, where: Standing) -> Finding | None:
    """A job whose time is up before the run is complete."""
    job = where.queued
    if where.ends is None or job is None or job.ends is None or job.has_ended or where.ends <= job.ends:
        return None
    rest = duration(where.ends - job.ends)
    return Finding(
        "time-limit", "note", f"the time of job {job.job} is up {rest} before the end; it saves and is tried again"
    )


DETECTORS: Final[tuple[Callable[[Snapshot, Standing], Finding | None], ...]] = (
    silent_ranks,
    stalled,
    checkpoint_late,
    fruitless,
    loss_not_finite,
    disk_full,
    never_starts,
    cut_off,
    not_seen,
    slower,
    damaged_files,
    queue_not_seen,
    lasts_longer,
)

_HEALTH: Final[Mapping[str, Health]] = {
    "not started": "waiting",
    "pending": "waiting",
    "starting": "healthy",
    "training": "healthy",
    "complete": "healthy",
    "stopped": "ended",
    "failed": "problem",
    "cut off": "problem",
    "unknown": "unknown",
}


def findings(snapshot: Snapshot) -> list[Finding]:
    """All that is wrong with a run, the worst first."""
    where = standing(snapshot)
    found = [finding for detect in DETECTORS if (finding := detect(snapshot, where)) is not None]
    return sorted(found, key=lambda finding: ("problem", "warning", "note").index(finding.severity))


def health(where: Standing, found: list[Finding]) -> Health:
    """A run's health in a word. What cannot be seen is `unknown`, whatever else is found."""
    own = _HEALTH[where.word]
    if own == "unknown" or (own == "problem"):
        return own
    worst = {finding.severity for finding in found}
    if "problem" in worst:
        return "problem"
    return "warning" if "warning" in worst else own
