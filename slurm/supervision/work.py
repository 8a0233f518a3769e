"""How far a job's work is, as its files say."""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ditmoe.data.storage.files import open_regular
from ditmoe.slurm.job_folder import Job, JobFolder, parts_made

STATE: Final = "state.json"
"""In the run folder: what a training run says of itself."""
_MOST_FILES: Final = 1_000_000
_DURATION: Final = re.compile(r"(?:(\d+)-)?(\d+):(\d+):(\d+)")
_CHECKPOINT: Final = re.compile(r"step-(\d+)")


def run_state(job: Job) -> dict[str, Any] | None:
    """What the run says of itself; None where it says nothing that can be read, or the job trains nothing."""
    if job.verb != "train" or job.run is None:
        return None
    with suppress(OSError, ValueError), open_regular(Path(job.run) / STATE) as file:
        state = json.loads(file.read())
        return state if isinstance(state, dict) else None
    return None


def is_cancelled(details: Mapping[str, str], restart: int) -> bool:
    """Whether somebody has cancelled a job, by what `scontrol show job` has of it while its batch step runs.

    A job that Slurm ends is COMPLETING, whatever ends it: one that it takes back into the queue has one restart
    more, and one whose time is up has run for that long.

    Args:
        details: by scontrol's names.
        restart: how often the job had been requeued when the batch step started.
    """
    if details.get("JobState") == "CANCELLED":
        return True
    if details.get("JobState") != "COMPLETING" or int(details.get("Restarts", "0")) > restart:
        return False
    ran, limit = _seconds(details.get("RunTime", "")), _seconds(details.get("TimeLimit", ""))
    return ran is not None and (limit is None or ran < limit)


def _seconds(text: str) -> float | None:
    """`D-HH:MM:SS` or `HH:MM:SS`; None for another word, as of a limit that there is not."""
    match = _DURATION.fullmatch(text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def progress(job: Job, folder: JobFolder) -> int | None:
    """How far a job is: the step of the newest complete checkpoint, or how many files there are of its work, or of
    workers, which work for others, how many parts they have made.
    """
    if job.verb == "workers":
        return parts_made(folder.path)
    if job.verb == "train" and job.run is not None:
        with suppress(FileNotFoundError):
            names = os.listdir(Path(job.run) / "checkpoints")
            return max((int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))), default=0)
        return 0
    out = folder.path.with_name(folder.path.name.removesuffix(".slurm"))
    work = Path(job.run) / "evaluations" if job.run is not None else out
    count = 0
    for _, _, names in os.walk(work):
        count += len(names)
        if count > _MOST_FILES:
            break
    return count


def word_of(
    job: Job, state: Mapping[str, Any] | None, before: Mapping[str, Any] | None, code: int | None
) -> str | None:
    """What the run says of itself after this attempt; what an earlier one said does not count."""
    if job.verb != "train":
        return None
    if state is None or (state == before and code != 0):
        return "unknown"
    return str(state.get("state"))


def reason_of(state: Mapping[str, Any] | None, before: Mapping[str, Any] | None) -> str:
    """Why the run stopped or failed, as it says after this attempt."""
    return "" if state is None or state == before else str(state.get("reason") or "")
