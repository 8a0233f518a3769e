"""All that is known of a run at one moment, as plain facts. Times are seconds since 1970."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ditmoe.slurm.attempts import Record
from ditmoe.slurm.client import QueuedJob, Unseen
from ditmoe.slurm.heartbeats import Heartbeat, Terms


@dataclass(frozen=True)
class State:
    """What the run says of itself: RUN/state.json."""

    state: str
    """`starting`, `training`, `complete`, `stopped` or `failed`."""
    time: float
    """When it was written."""
    step: int | None = None
    steps: int | None = None
    images: int | None = None
    images_per_second: float | None = None
    reason: str = ""
    host: str | None = None
    job: str | None = None
    """Slurm's job id; None: the run is no job of Slurm."""


@dataclass(frozen=True)
class Saved:
    """The newest complete checkpoint."""

    step: int
    time: float
    bytes: int | None
    """Of all its files; None: its marker could not be read."""


@dataclass(frozen=True)
class Recorded:
    """A line of RUN/stats.jsonl."""

    step: int
    loss: float | None
    """None: it was no finite number, or there was none, as all steps were skipped."""
    images_per_second: float | None
    skipped: bool
    """Whether some of its steps were skipped."""


@dataclass(frozen=True)
class Owner:
    """The process that last held the run's lock: its rank 0."""

    pid: int
    host: str
    alive: bool | None
    """Whether it holds the lock now; None: it is on another machine, or may not be looked at."""


@dataclass(frozen=True)
class OtherJob:
    """A job folder of the run beside that of its training: an evaluation."""

    name: str
    jobs: tuple[QueuedJob, ...]
    """Its jobs that the queue has."""
    outcome: str | None
    """How its last attempt ended; None: none has."""


@dataclass(frozen=True)
class Snapshot:
    """What is known of a run."""

    run: Path
    now: float
    state: State | None = None
    saved: Saved | None = None
    recorded: tuple[Recorded, ...] = ()
    """The last ones, oldest first."""
    steps: int | None = None
    log_every: int | None = None
    """Steps between two records, and two writings of state.json."""
    checkpoint_every: int | None = None
    """Steps."""
    owner: Owner | None = None
    record: Record = field(default_factory=Record)
    """The attempts of its training jobs."""
    queue: Mapping[str, QueuedJob] | Unseen | None = None
    """What squeue has of its training jobs; None: there are none to ask for."""
    accounts: Mapping[str, QueuedJob] | Unseen | None = None
    """What sacct has of those that squeue does not have; None: none to ask for."""
    heartbeats: tuple[Heartbeat, ...] = ()
    """Of the ranks of the attempt that runs; none where it is not supervised."""
    terms: Terms = field(default_factory=Terms)
    """What the ranks are watched by; the defaults where nobody watches them."""
    free_bytes: int | None = None
    """Of the run folder's disk; None: not known."""
    others: tuple[OtherJob, ...] = ()
    unreadable: tuple[str, ...] = ()
    """What is there and could not be read, and why."""

    @property
    def jobs(self) -> tuple[str, ...]:
        """Ids of the jobs that were to train the run, in the order in which they became known."""
        known = [submission.job for submission in self.record.submissions]
        known += [attempt.job for attempt in self.record.attempts]
        if self.state is not None and self.state.job is not None:
            known.append(self.state.job)
        if isinstance(self.queue, Mapping):
            known += self.queue
        return tuple(dict.fromkeys(known))
