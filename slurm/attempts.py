"""The attempts of a job on record: `attempts.jsonl` of its job folder, which only grows.

One JSON object per line; times are seconds since 1970, steps those of the newest complete checkpoint (null where
the job trains nothing):

    {"event": "submitted", "job": "123", "time": …}
    {"event": "cancel", "time": …}
    {"event": "start", "attempt": 1, "job": "123", "restart": 0, "hosts": ["n1", "n2"], "step": 0, "time": …}
    {"event": "end", "attempt": 1, "outcome": "stopped", "reason": "SIGUSR2 came: …", "exit_code": 0, "step": 40,
     "hosts": ["n1", "n2"], "suspects": [], "excluded": [], "decision": "requeue", "time": …}

A cancel concerns every job that is on record by then. An attempt without an end runs, or was cut off: its node
died, or somebody killed the batch script. The next start closes it with the outcome `cut-off`.

A disk that fills ends an attempt, and the record often lies on the same disk: each start lays a file `reserve`
beside it, which is given up for the line that does not fit.
"""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

from ditmoe.data.storage.files import open_appending, open_regular
from ditmoe.model.errors import UserError

ATTEMPTS: Final = "attempts.jsonl"
"""The file's name in a job folder."""
RESERVE: Final = "reserve"
RESERVE_BYTES: Final = 2**17
"""More than the end of an attempt takes, on file systems with large blocks too."""
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)

Outcome = Literal[
    "complete", "stopped", "failed", "hung", "node-check", "user-error", "no-progress", "cut-off", "cancelled"
]
"""How an attempt ended: all is done; a signal stopped it; a process of it failed; ranks fell silent; a node did
not pass the check; the user's mistake (exit code 2); one attempt too many brought nothing; nobody saw its end; the
user cancelled the job."""

Decision = Literal["requeue", "stop", "done"]
"""What followed: another attempt, no further one, or nothing is left to do."""


@dataclass(frozen=True)
class End:
    """How an attempt ended, and what was decided."""

    outcome: Outcome
    reason: str
    """One sentence for who reads the record."""
    exit_code: int | None
    """Of the program; None: nobody saw it."""
    step: int | None
    """Of the newest complete checkpoint; None: the job trains nothing, or the folder could not be read."""
    hosts: tuple[str, ...]
    """That the attempt ran on."""
    suspects: tuple[str, ...]
    """Of these, the ones that are to blame for all that is known."""
    excluded: tuple[str, ...]
    """The hosts that the queue says it will not give to the next attempt."""
    decision: Decision
    time: float


@dataclass(frozen=True)
class Attempt:
    """One start of the job."""

    number: int
    """From 1, over all jobs that worked on this job folder."""
    job: str
    """Slurm's job id."""
    restart: int
    """How often Slurm had requeued this job (SLURM_RESTART_COUNT)."""
    hosts: tuple[str, ...]
    step: int | None
    """Of the newest complete checkpoint at the start."""
    time: float
    end: End | None = None


@dataclass(frozen=True)
class Submission:
    """A job that was handed to Slurm."""

    job: str
    time: float


@dataclass(frozen=True)
class Record:
    """All of `attempts.jsonl`."""

    submissions: tuple[Submission, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    damaged: tuple[int, ...] = ()
    """Numbers, from 1, of lines that cannot be read, as of a writer that was killed; they count for nothing."""
    started_before: Mapping[str, int] = field(default_factory=dict)
    """Job → how many attempts had started when it was first heard of."""

    cancelled: frozenset[str] = frozenset()
    """Jobs that the user wants to end for good."""

    def since(self, job: str) -> tuple[Attempt, ...]:
        """The attempts that started since a job was submitted: its own, and those of its chain before it.

        A job of which nothing is on record has none: somebody has just submitted it by hand.
        """
        return self.attempts[self.started_before.get(job, len(self.attempts)) :]

    def waiting(self, job: str) -> tuple[str, ...]:
        """The other jobs that were submitted and have not started: of a chain, those that come after `job`."""
        started = {attempt.job for attempt in self.attempts}
        jobs = dict.fromkeys(submission.job for submission in self.submissions)
        return tuple(other for other in jobs if other != job and other not in started)


def read_attempts(job_folder: Path) -> Record:
    """What is on record; nothing, where the file is not there yet.

    Raises:
        UserError: the file cannot be read at all.
    """
    path = job_folder / ATTEMPTS
    try:
        with open_regular(path) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return Record()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; expected the attempts of a job") from error
    submissions: list[Submission] = []
    attempts: dict[int, Attempt] = {}
    damaged: list[int] = []
    started_before: dict[str, int] = {}
    cancelled: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            _take(json.loads(line), submissions, attempts, started_before, cancelled)
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged.append(number)
    return Record(
        tuple(submissions), tuple(attempts.values()), tuple(damaged), started_before, frozenset(cancelled)
    )


def record_submission(job_folder: Path, job: str, time: float) -> None:
    """Append that a job was handed to Slurm; of a chain, every job, each as soon as Slurm has it."""
    _append(job_folder, {"event": "submitted", "job": job, "time": time})


def record_cancel(job_folder: Path, time: float) -> None:
    """Append that the user wants all jobs on record to end: after a checkpoint, none of them is requeued."""
    _append(job_folder, {"event": "cancel", "time": time})


def record_start(job_folder: Path, attempt: Attempt) -> None:
    """Append that an attempt starts, and lay by the room that its end will need."""
    facts = asdict(attempt)
    del facts["end"]
    _append(job_folder, {"event": "start", "attempt": facts.pop("number"), **facts})
    _lay_by(job_folder / RESERVE)


def record_end(job_folder: Path, number: int, end: End) -> None:
    """Append how an attempt ended."""
    _append(job_folder, {"event": "end", "attempt": number, **asdict(end)})


def _take(
    event: Any,
    submissions: list[Submission],
    attempts: dict[int, Attempt],
    started_before: dict[str, int],
    cancelled: set[str],
) -> None:
    """Add one line's event to what was read before. ValueError, KeyError or TypeError where it is none."""
    kind = event["event"]
    if kind == "submitted":
        submission = Submission(_text(event["job"]), float(event["time"]))
        submissions.append(submission)
        started_before.setdefault(submission.job, len(attempts))
    elif kind == "cancel":
        cancelled.update(started_before)
    elif kind == "start":
        attempt = Attempt(
            int(event["attempt"]),
            _text(event["job"]),
            int(event["restart"]),
            _texts(event["hosts"]),
            _step(event["step"]),
            float(event["time"]),
        )
        started_before.setdefault(attempt.job, len(attempts))
        attempts[attempt.number] = attempt
    elif kind == "end":
        attempt = attempts[int(event["attempt"])]
        if event["outcome"] not in get_args(Outcome) or event["decision"] not in get_args(Decision):
            raise ValueError(event)
        end = End(
            event["outcome"],
            _text(event["reason"]),
            _step(event["exit_code"]),
            _step(event["step"]),
            _texts(event["hosts"]),
            _texts(event["suspects"]),
            _texts(event["excluded"]),
            event["decision"],
            float(event["time"]),
        )
        attempts[attempt.number] = replace(attempt, end=end)
    else:
        raise ValueError(kind)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    return tuple(_text(value) for value in values)


def _step(value: Any) -> int | None:
    return None if value is None else int(value)


def _ends_within_a_line(path: Path) -> bool:
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read(1) not in (b"", b"\n")


def _append(job_folder: Path, event: Mapping[str, Any]) -> None:
    """Append one line in one write, and wait until the disk has it."""
    path = job_folder / ATTEMPTS
    line = json.dumps(event, allow_nan=False).encode() + b"\n"
    try:
        job_folder.mkdir(parents=True, exist_ok=True)
        try:
            _append_line(path, line)
        except OSError as error:
            if error.errno not in _FULL or not (job_folder / RESERVE).exists():
                raise
            (job_folder / RESERVE).unlink()
            _append_line(path, line)
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}") from error


def _append_line(path: Path, line: bytes) -> None:
    """OSError where it does not get to the disk; then nothing of it stays."""
    # Without Python's buffer, which would try again to write what did not fit.
    with open_appending(path).detach() as file:
        size = os.fstat(file.fileno()).st_size
        # A writer that was killed may have left a line without its end.
        rest = b"\n" + line if _ends_within_a_line(path) else line
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, size)
            raise


def _lay_by(path: Path) -> None:
    """Take room on the disk, where it is not there. Random bytes: file systems store nothing for zeros."""
    try:
        if not path.exists():
            path.write_bytes(os.urandom(RESERVE_BYTES))
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno not in _FULL:
            raise UserError(f"{path}: could not be written: {error.strerror or error}") from error
