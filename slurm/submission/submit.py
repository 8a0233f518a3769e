"""Hands a job to Slurm: refuses a second one, writes the job folder, and records what was submitted.

Whenever it is killed, repeating it is all that is needed: the script is removed first and written last, so that
what can be started is whole, and a job that Slurm has taken is found in the queue.
"""

import fcntl
import os
import subprocess
import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ditmoe.data.storage.files import make_folder, replacing
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import printable
from ditmoe.slurm.attempts import record_submission
from ditmoe.slurm.client import Queue, Unseen
from ditmoe.slurm.submission.script import STRANGERS, Request, render
from ditmoe.slurm.submission.settings import JobSettings
from ditmoe.slurm.submission.snapshot import take_snapshot

_KEPT: Final = ("SLURM_CONF", "SLURM_CLUSTERS")
_DECIDED: Final = {
    "time": "TIMELIMIT",
    "mem": "MEM_PER_NODE",
    "partition": "PARTITION",
    "account": "ACCOUNT",
    "qos": "QOS",
    "constraint": "CONSTRAINT",
    "cpus_per_task": "CPUS_PER_TASK",
}
"""Setting → the variable that sbatch would take before the script's line."""
_NEVER: Final = (
    "ARRAY_INX",
    "EXPORT",
    "JOB_NAME",
    "NO_REQUEUE",
    "OPEN_MODE",
    "OUTPUT",
    "SIGNAL",
    "WAIT",
    "WAIT_ALL",
)
_BASH_SECONDS: Final = 20
_SCHEDULER_SECONDS: Final = 3.0
"""That Slurm may take until it says why a new job waits."""
_POLL_SECONDS: Final = 0.3


def forget_other_jobs(environment: MutableMapping[str, str], settings: JobSettings | None = None) -> None:
    """Remove what an environment says of another job, step or rank, and what sbatch would take before the script.

    Who submits from within a job has its SLURM_*; a new job would take some of them for its own.
    """
    for name in list(environment):
        if name in STRANGERS or (name.startswith(("SLURM_", "SLURMD_", "SRUN_", "PMI_")) and name not in _KEPT):
            del environment[name]
    decided = [name for key, name in _DECIDED.items() if getattr(settings, key, None) is not None]
    for name in (*decided, *_NEVER):
        environment.pop(f"SBATCH_{name}", None)


def script_of(request: Request) -> str:
    """The batch script, checked by bash.

    Raises:
        UserError: a folder cannot stand in it, the preamble is no shell, or there is no bash.
    """
    try:
        script = render(request)
    except ValueError as error:
        raise UserError(str(error)) from None
    for what, text in (("preamble of the site file", request.settings.preamble), ("batch script", script)):
        complaint = _bash_complaint(text)
        if complaint:
            raise UserError(f"{what}: bash does not take it: {complaint}")
    return script


def _bash_complaint(text: str) -> str:
    """What bash says of a text that it reads and does not run; also of a here-document without an end.

    UserError where there is no bash.
    """
    try:
        done = subprocess.run(
            ["bash", "-n"], input=text.encode(errors="surrogateescape"), capture_output=True, timeout=_BASH_SECONDS
        )
    except OSError as error:
        raise UserError(f"bash cannot be run ({error.strerror}); expected it on the PATH: jobs are bash") from None
    except subprocess.TimeoutExpired:
        return f"no answer within {_BASH_SECONDS} s"
    return printable(done.stderr.decode(errors="replace").strip().partition("\n")[0])


def submit(request: Request, queue: Queue, config: str | None = None, private: bool = False) -> list[str]:
    """Write the job folder and hand the job to Slurm; returns its id, or those of the chain.

    Args:
        request: what is asked for.
        queue: Slurm.
        config: text of the configuration that the job trains; None: it trains nothing.
        private: nobody but the owner may read the configuration.

    Raises:
        UserError: a job of this folder is in the queue, the queue cannot be asked, the file system refuses, or
            sbatch refuses.
    """
    folder, job = request.folder, request.job
    script = script_of(request)
    refuse_second(queue, job.name, folder.path)  # before a folder is made; and again once nobody else submits it
    make_folder(folder.path)
    with _alone(folder.path):
        refuse_second(queue, job.name, folder.path)
        _write(request, script, config, private)
        jobs: list[str] = []
        for _ in range(job.chain):
            try:
                jobs.append(queue.submit(folder.script))
            except UserError as error:
                taken = f" (of the chain it has taken {', '.join(jobs)})" if jobs else ""
                raise UserError(f"{error}{taken}; the batch script is {folder.script}") from None
            record_submission(folder.path, jobs[-1], time.time())
    return jobs


def write_job(request: Request, config: str | None = None, private: bool = False) -> None:
    """Write the job folder and submit nothing; arguments and errors as of `submit`."""
    script = script_of(request)
    make_folder(request.folder.path)
    with _alone(request.folder.path):
        _write(request, script, config, private)


def _write(request: Request, script: str, config: str | None, private: bool) -> None:
    folder = request.folder
    with _told(folder.script):
        folder.script.unlink(missing_ok=True)
    take_snapshot(folder.code)
    if config is not None:
        with replacing(folder.config, private=private) as file:
            file.write(config.encode())
    folder.store(request.job)
    with replacing(folder.script) as file:
        file.write(script.encode(errors="surrogateescape"))


def refuse_second(queue: Queue, name: str, folder: Path) -> None:
    """UserError where a job of this name waits or runs, or the queue does not say whether."""
    found = queue.named(name)
    if isinstance(found, Unseen):
        raise unseen_queue(found, str(folder))
    for job in found.values():
        if not job.has_ended:
            where = f" on {', '.join(job.hosts)}" if job.hosts else f" ({job.reason})" if job.reason else ""
            raise UserError(
                f"{folder}: job {job.job} is {job.state}{where}; expected none in the queue: wait for its end, or"
                f" cancel it"
            )


def unseen_queue(found: Unseen, what: str) -> UserError:
    """The message for who submits something, where the queue does not say whether it is there already."""
    return UserError(
        f"{what}: whether a job of it is in the queue cannot be seen: {found.problem}. Nothing was submitted;"
        " --dry-run shows the batch script, and needs no Slurm"
    )


def never_starting(queue: Queue, jobs: Sequence[str]) -> list[str]:
    """A line for each of these jobs of which the queue says already that it will not start by itself.

    Slurm takes a job that asks for more than its partition allows, unless the cluster forbids that, and says so
    once its scheduler has looked at it.
    """
    deadline = time.monotonic() + _SCHEDULER_SECONDS
    while True:
        found = queue.jobs(jobs)
        if isinstance(found, Unseen):
            return []  # it was taken: `ditmoe status` says what cannot be seen
        if time.monotonic() > deadline or all(job.state != "PENDING" or job.reason for job in found.values()):
            break
        time.sleep(_POLL_SECONDS)
    return [
        f"job {job.job} does not start by itself: Slurm's reason is {job.reason}; expected nodes, time and"
        " partition that go together (`sinfo` lists partitions)"
        for job in found.values()
        if job.never_starts and not job.reason.startswith("Dependency")
    ]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a job folder while a job is submitted; UserError where another process does."""
    with _told(folder):
        descriptor = os.open(folder / "submit.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process submits it at this moment; expected no other") from None
        except OSError:
            pass  # a file system without locks: the queue and the run's own lock are asked as well
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the file system refuses, as a message."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}") from error
