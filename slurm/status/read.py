"""Reads what is known of runs: first their folders, then the queue, then the accounting; each is asked once."""

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import yaml

from ditmoe.data.storage.files import open_regular
from ditmoe.model.errors import UserError
from ditmoe.slurm.attempts import Record, read_attempts
from ditmoe.slurm.client import Queue, QueuedJob, Unseen
from ditmoe.slurm.heartbeats import Heartbeat, Terms, read_heartbeats, read_terms
from ditmoe.slurm.job_folder import JobFolder, job_folders, job_name, training_folder
from ditmoe.slurm.status.snapshot import OtherJob, Owner, Recorded, Saved, Snapshot, State

STATE: Final = "state.json"
STATS: Final = "stats.jsonl"
LOCK: Final = "lock"
CONFIG: Final = "config.yaml"
CHECKPOINTS: Final = "checkpoints"
MARKER: Final = "checkpoint.json"
RECORDS_READ: Final = 200
_TAIL_BYTES: Final = 2**20
_MOST_MARKER_BYTES: Final = 32 * 2**20
_CHECKPOINT: Final = re.compile(r"step-([0-9]{8,18})")


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run: trained, or to be trained by a job."""
    return (folder / CONFIG).is_file() or (folder / STATE).is_file() or training_folder(folder).path.is_dir()


def runs_below(folder: Path) -> list[Path]:
    """The run folders in a folder, by name, and in folders within it that are no runs themselves."""
    found: list[Path] = []
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or not path.is_dir() or path.is_symlink():
                continue
            found += [path] if is_run(path) else [inner for inner in sorted(path.glob("*")) if is_run(inner)]
    return found


def read_snapshots(runs: Sequence[Path], queue: Queue, now: float | None = None) -> list[Snapshot]:
    """What is known of runs.

    Args:
        runs: their folders.
        queue: asked only where a job of Slurm was to train one of them.
        now: seconds since 1970.

    Raises:
        UserError: a folder is none of a run.
    """
    snapshots = [_of_files(run, time.time() if now is None else now) for run in runs]
    others = [_other_folders(snapshot.run) for snapshot in snapshots]
    if not any(map(_may_have_jobs, snapshots)) and not any(others):
        return snapshots
    jobs = [job for snapshot in snapshots for job in snapshot.jobs]
    names = [job_name(training_folder(snapshot.run)) for snapshot in snapshots if _may_have_jobs(snapshot)]
    damaged: dict[Path, list[str]] = {snapshot.run: [] for snapshot in snapshots}
    records = {
        folder.path: _record(folder, damaged[snapshot.run])
        for snapshot, folders in zip(snapshots, others, strict=True)
        for folder in folders
    }
    jobs += [submission.job for record in records.values() for submission in record.submissions]
    listed = _merged(queue.jobs(jobs), queue.named(*names))
    missing = [job for job in jobs if isinstance(listed, Unseen) or not _elements(listed, [job])]
    accounts = queue.accounted(missing) if missing else None
    return [
        replace(
            _with_queue(snapshot, listed, accounts),
            others=tuple(_other(folder, records[folder.path], listed) for folder in folders),
            unreadable=(*snapshot.unreadable, *damaged[snapshot.run]),
        )
        for snapshot, folders in zip(snapshots, others, strict=True)
    ]


def _of_files(run: Path, now: float) -> Snapshot:
    """What a run's folder says."""
    if not run.is_dir() or not is_run(run):
        raise UserError(f"{run}: no run found; expected a folder with {CONFIG}, as `ditmoe train` makes it")
    problems: list[str] = []
    state = _state(run, problems)
    config = _config(run, problems)
    folder = training_folder(run)
    record = _record(folder, problems)
    terms, heartbeats = _heartbeats(folder, record, problems)
    return Snapshot(
        run=run,
        now=now,
        state=state,
        saved=newest_saved(run),
        recorded=_recorded(run, problems),
        steps=config.get("steps"),
        log_every=config.get("log_every"),
        checkpoint_every=config.get("checkpoint_every"),
        owner=read_owner(run),
        record=record,
        heartbeats=heartbeats,
        terms=terms,
        free_bytes=shutil.disk_usage(run).free,
        unreadable=tuple(problems),
    )


def _record(folder: JobFolder, problems: list[str]) -> Record:
    """The attempts of a job folder; none, where they cannot be read."""
    try:
        return read_attempts(folder.path)
    except UserError as error:
        problems.append(str(error))
        return Record()


def _state(run: Path, problems: list[str]) -> State | None:
    path = run / STATE
    values = _json(path, problems)
    if values is None:
        return None
    try:
        return State(
            state=str(values["state"]),
            time=float(values["time"]),
            step=_integer(values.get("step")),
            steps=_integer(values.get("steps")),
            images=_integer(values.get("images")),
            images_per_second=_real(values.get("images_per_second")),
            reason=str(values.get("reason") or ""),
            host=_text(values.get("host")),
            job=_text(values.get("job")),
        )
    except (KeyError, TypeError, ValueError) as error:
        problems.append(f"{path}: not the state of a run ({type(error).__name__}: {error})")
        return None


def newest_saved(run: Path) -> Saved | None:
    """The newest complete checkpoint of a run."""
    try:
        names = os.listdir(run / CHECKPOINTS)
    except OSError:
        return None
    steps = {int(match[1]): match[0] for match in map(_CHECKPOINT.fullmatch, names) if match}
    for step in sorted(steps, reverse=True):
        marker = run / CHECKPOINTS / steps[step] / MARKER
        with suppress(OSError), open_regular(marker) as file:
            facts = os.fstat(file.fileno())
            content = file.read() if facts.st_size <= _MOST_MARKER_BYTES else b""
            return Saved(step, facts.st_mtime, _bytes_of(content))
    return None


def _bytes_of(marker: bytes) -> int | None:
    """Bytes of all files that a checkpoint's marker lists."""
    try:
        return sum(int(facts["bytes"]) for facts in json.loads(marker)["files"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _recorded(run: Path, problems: list[str]) -> tuple[Recorded, ...]:
    """The last lines of stats.jsonl."""
    path = run / STATS
    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[1 if size > _TAIL_BYTES else 0 :]
    except FileNotFoundError:
        return ()
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
        return ()
    found = []
    for line in lines[-RECORDS_READ - 1 :]:
        with suppress(ValueError, KeyError, TypeError, RecursionError):  # one that is being written
            values = json.loads(line)
            step, speed = int(values["step"]), _real(values.get("images_per_second"))
            found.append(Recorded(step, _real(values.get("loss")), speed, "skipped_steps" in values))
    return tuple(found)


def read_owner(run: Path) -> Owner | None:
    """The process that last held the run's lock, and whether it still does, where that can be seen from here."""
    path = run / LOCK
    values = _json(path, [])
    try:
        pid, host = int((values or {})["pid"]), str((values or {})["host"])
    except (KeyError, TypeError, ValueError):
        return None
    if host != socket.gethostname():
        return Owner(pid, host, None)
    return Owner(pid, host, _has_open(pid, path))


def _has_open(pid: int, path: Path) -> bool | None:
    """Whether a process of this machine has a file open; None: it may not be looked at."""
    try:
        wanted = path.stat()
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except FileNotFoundError:
        return False
    except OSError:
        return None
    for number in descriptors:
        with suppress(OSError):
            found = os.stat(f"/proc/{pid}/fd/{number}")
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


def _config(run: Path, problems: list[str]) -> dict[str, int]:
    """`train.steps`, `train.log_every` and `train.checkpoint_every` of config.yaml, those that it has."""
    path = run / CONFIG
    if not path.exists():
        path = training_folder(run).config
    try:
        with open_regular(path) as file:
            values = yaml.safe_load(file)
        train = values["train"]
        return {key: int(train[key]) for key in ("steps", "log_every", "checkpoint_every") if key in train}
    except FileNotFoundError:
        return {}
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{path}: not the configuration of a run ({type(error).__name__})")
    return {}


def _heartbeats(folder: JobFolder, record: Record, problems: list[str]) -> tuple[Terms, tuple[Heartbeat, ...]]:
    """What the ranks of the attempt that runs last said."""
    terms = read_terms(folder.heartbeats)
    attempt = record.attempts[-1] if record.attempts else None
    if attempt is None or attempt.end is not None:
        return terms, ()
    try:
        found = read_heartbeats(folder.heartbeats, attempt.number)
    except FileNotFoundError:
        return terms, ()
    except OSError as error:
        problems.append(f"{folder.heartbeats}: {error.strerror}")
        return terms, ()
    return terms, tuple(found[rank] for rank in sorted(found))


def _other_folders(run: Path) -> list[JobFolder]:
    training = training_folder(run).path
    return [folder for folder in job_folders(run) if folder.path != training]


def _other(folder: JobFolder, record: Record, listed: Mapping[str, QueuedJob] | Unseen) -> OtherJob:
    jobs = {} if isinstance(listed, Unseen) else _elements(listed, [s.job for s in record.submissions])
    end = record.attempts[-1].end if record.attempts else None
    return OtherJob(folder.path.name, tuple(jobs.values()), None if end is None else end.outcome)


def _may_have_jobs(snapshot: Snapshot) -> bool:
    """Whether jobs are on record, or its script may have been handed in by hand."""
    return bool(snapshot.jobs) or training_folder(snapshot.run).path.is_dir()


def _with_queue(
    snapshot: Snapshot,
    listed: Mapping[str, QueuedJob] | Unseen,
    accounts: Mapping[str, QueuedJob] | Unseen | None,
) -> Snapshot:
    """A snapshot with what the queue has of its own jobs."""
    if not _may_have_jobs(snapshot):
        return snapshot
    if isinstance(listed, Unseen):
        own: Mapping[str, QueuedJob] | Unseen = listed
    else:
        name = job_name(training_folder(snapshot.run))
        own = _elements(listed, snapshot.jobs) | {key: job for key, job in listed.items() if job.name == name}
    theirs = accounts
    if isinstance(accounts, Mapping):
        theirs = _elements(accounts, snapshot.jobs)
    return replace(snapshot, queue=own, accounts=theirs)


def _elements(listed: Mapping[str, QueuedJob], jobs: Iterable[str]) -> dict[str, QueuedJob]:
    """Of what is listed these jobs, and the elements of those that are arrays."""
    wanted = set(jobs)
    return {key: job for key, job in listed.items() if key in wanted or key.partition("_")[0] in wanted}


def _merged(
    first: Mapping[str, QueuedJob] | Unseen, second: Mapping[str, QueuedJob] | Unseen
) -> Mapping[str, QueuedJob] | Unseen:
    """All jobs of two answers; where one of them is none, that: half an answer would pass for the whole."""
    if isinstance(first, Unseen):
        return first
    return second if isinstance(second, Unseen) else {**first, **second}


def _json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """A small JSON object; None where there is none, or none that can be read."""
    try:
        with open_regular(path) as file:
            values = json.loads(file.read(_TAIL_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path}: {getattr(error, 'strerror', None) or error}")
        return None
    if not isinstance(values, dict):
        problems.append(f"{path}: holds a {type(values).__name__}, expected an object")
        return None
    return values


def _integer(value: Any) -> int | None:
    return None if value is None else int(value)


def _real(value: Any) -> float | None:
    return None if value is None else float(value)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
