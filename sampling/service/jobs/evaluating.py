"""Does evaluations: each by a process of `ditmoe evaluate`, which is watched, ended, and started again.

What is done of one lies in chunks on disk, so that one that is taken up again goes on where it was.
"""

import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

from ditmoe.data.storage.files import make_folder, read_object
from ditmoe.model.errors import UserError
from ditmoe.sampling.batching.engine import Cancelled
from ditmoe.sampling.evaluation.of_run import prepare_job
from ditmoe.sampling.service.jobs.evaluators import Evaluators
from ditmoe.sampling.service.jobs.store import COMPLETED, FAILED, QUEUED, Job, JobStore
from ditmoe.sampling.service.listing import Listed
from ditmoe.sampling.service.requests import EvaluationJob

LOG: Final = logging.getLogger("ditmoe.service")
JOB_VARIABLE: Final = "DITMOE_SERVICE_JOB"
"""Environment variable of all processes of a job, whoever started them: its id."""
MOST_ATTEMPTS: Final = 10
"""Times that a job whose process was killed is taken up without any more images."""
POLL_SECONDS: Final = 0.2
GRACE_SECONDS: Final = 10.0
STOPPED_SECONDS: Final = 30.0
"""After which a process that somebody has stopped (SIGSTOP) is ended, and another goes on."""

StartChild = Callable[[Sequence[str], Path, Mapping[str, str]], "subprocess.Popen[bytes]"]
"""(a verb of ours and its arguments, file that its output goes to, more of its environment) → its process, which
ends with this one."""


class Evaluating:
    """What does evaluations for one thread at a time."""

    def __init__(self, store: JobStore, evaluators: Evaluators, start_child: StartChild) -> None:
        """Do nothing yet."""
        self._store, self._evaluators, self._start_child = store, evaluators, start_child

    def do(
        self, job: Job, request: EvaluationJob, listed: Listed, stop: threading.Event
    ) -> tuple[str, str | None]:
        """Have a process do what is missing.

        Args:
            stop: it is cancelled, or the service ends.

        Returns:
            The state of the job, and what went wrong.

        Raises:
            Cancelled: it was stopped before its end.
            ServiceError, UserError: it cannot be done.
        """
        options = self._evaluators.options(request, listed)
        results = prepare_job(options).folder.resolve()
        log = self._store.folder_of(job.id) / "output.txt"
        make_folder(log.parent)
        if stop.is_set():
            raise Cancelled
        begun = log.stat().st_size if log.exists() else 0
        child = self._start_child(self._evaluators.arguments(options), log, {JOB_VARIABLE: job.id})
        try:
            self._store.set(job.id, folder=str(results))
            self._watch(child, job, results, stop)
        finally:
            _end(child)
            end_processes(job.id)  # those of a crew whose leader was killed
        if child.returncode == 0:
            return COMPLETED, None
        if stop.is_set():
            raise Cancelled
        if child.returncode < 0 or child.returncode > 128:
            now = self._store.get(job.id)
            if now is not None and now.attempts < MOST_ATTEMPTS:
                return QUEUED, None
            number = -child.returncode if child.returncode < 0 else child.returncode - 128
            return FAILED, f"its process was ended by signal {number} {MOST_ATTEMPTS} times"
        return FAILED, _last_words(log, begun)

    def _watch(self, child: "subprocess.Popen[bytes]", job: Job, results: Path, stop: threading.Event) -> None:
        """Wait until it ends, is to end, or has been stopped for long, and is then killed."""
        moved = time.monotonic()
        while child.returncode is None and not stop.is_set():
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=POLL_SECONDS)
            self._store_progress(job, results)
            if not _is_stopped(child.pid):
                moved = time.monotonic()
            elif time.monotonic() - moved > STOPPED_SECONDS:
                LOG.warning("%s: its process was stopped; another goes on", job.id)
                child.kill()

    def _store_progress(self, job: Job, results: Path) -> None:
        """Note the images that an evaluation has drawn."""
        with suppress(OSError, UserError, KeyError, ValueError):
            size = int(read_object(results / "evaluation.json")["chunk"])
            with os.scandir(results / "chunks") as entries:
                chunks = sum(entry.name.endswith(".npz") for entry in entries)
            done = min(job.total, chunks * size)
            if done > job.done:
                self._store.progress(job.id, done)
                job.done = done


def end_processes(job_id: str) -> None:
    """End all processes of a job, also those that outlived who started them."""
    while True:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it has ended, or is another user's
                if process.pid != os.getpid() and process.environ().get(JOB_VARIABLE) == job_id:
                    process.kill()
                    found.append(process)
        if not found or psutil.wait_procs(found, timeout=GRACE_SECONDS)[1]:
            return


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End a process: politely, and then not."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _last_words(log: Path, begun: int) -> str:
    """What a process said of its failure."""
    with log.open("rb") as file:
        file.seek(begun)
        lines = file.read()[-20_000:].decode(errors="replace").splitlines()
    starts = [place for place, line in enumerate(lines) if line.startswith("error: ")]
    if not starts:
        return "the evaluation failed; the service's log and the job's output.txt say why"
    return "\n".join(lines[starts[-1] :]).removeprefix("error: ")
