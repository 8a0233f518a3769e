"""The program of the batch step: one attempt of a job, from the check of its nodes to what follows its end.

    python -m ditmoe.slurm.supervise JOB_FOLDER

It starts the job's command by srun, passes on the signals that ask for an end, watches the ranks' heartbeats,
kills what hangs, and decides by `ditmoe.slurm.requeue`. Nothing that may hang is done in its main thread: a shared
folder that does not answer ends the attempt like any other silence.
"""

import ctypes
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeVar

from ditmoe.model.errors import UserError
from ditmoe.slurm.attempts import (
    Attempt,
    Record,
    read_attempts,
    record_end,
    record_start,
    record_submission,
)
from ditmoe.slurm.check import NodeReports, check_command
from ditmoe.slurm.client import Queue
from ditmoe.slurm.heartbeats import FOLDER_VARIABLE, Terms, read_heartbeats
from ditmoe.slurm.hostlist import hosts_of
from ditmoe.slurm.job_folder import Job, JobFolder, opened, read_job
from ditmoe.slurm.requeue import EXIT_USER_ERROR, Seen, Silence, opening
from ditmoe.slurm.supervision.follow import FollowUp
from ditmoe.slurm.supervision.patience import FOLDER_SECONDS, Shared, Teller
from ditmoe.slurm.supervision.step import Step
from ditmoe.slurm.supervision.watchdog import Watchdog
from ditmoe.slurm.supervision.work import is_cancelled, progress, reason_of, run_state, word_of

HEARD: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
LOCK_SECONDS: Final = 60.0
"""How long to wait for another supervisor of the job folder to end."""
CHECK_SECONDS: Final = 420.0
"""How long the check of the nodes may take."""

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h

T = TypeVar("T")


class Supervisor:
    """One attempt of a job.

    Args:
        folder: the job folder.
        environment: of the batch step.
        queue: Slurm's programs.
        say: shows a message.
        start_step: starts srun.
    """

    def __init__(
        self,
        folder: JobFolder,
        environment: Mapping[str, str],
        queue: Queue,
        say: Teller,
        start_step: Callable[..., Step] = Step,
    ) -> None:
        self.folder = folder
        self.environment = environment
        self.queue = queue
        self.say = say
        self.start_step = start_step
        self.shared = Shared()
        self.job_id = environment.get("DITMOE_JOB") or environment["SLURM_JOB_ID"]
        """`123`; of an element of an array `123_4`, as Slurm's programs take both."""
        self.asked: str | None = None
        """Name of the first signal that asked for an end."""
        self.wake = threading.Event()
        self.script = os.getppid()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Take a request to end."""
        self.asked = self.asked or signal.Signals(number).name
        self.wake.set()

    def run(self) -> int:
        """Make the attempt; the exit code of the batch job.

        Raises:
            UserError: job.json or the record cannot be read, or another supervisor works on the job folder.
            TimeoutError: the shared folder does not answer, before anything was started.
        """
        lock = self._ask(self._lock, LOCK_SECONDS + FOLDER_SECONDS)
        try:
            return self._run()
        finally:
            os.close(lock)

    def _run(self) -> int:
        job = self._ask(lambda: read_job(self.folder))
        record = self._ask(lambda: read_attempts(self.folder.path))
        if record.damaged:
            self.say(
                f"{self.folder.path}: lines {record.damaged} of the attempts cannot be read, and do not count"
            )
        step = self._ask(lambda: progress(job, self.folder))
        found = opening(record, self.job_id, step, time.time(), job.attempts)
        for number, end in found.closed:
            self._ask(lambda number=number, end=end: record_end(self.folder.path, number, end))  # type: ignore[misc]
            self.say(f"attempt {number} was cut off: {end.reason}")
        if found.refusal is not None:
            self.say(f"not started, as the last attempt ended so: {found.refusal.outcome}: {found.refusal.reason}")
            return found.refusal.exit_code
        attempt = self._begin(job, record, step)
        seen = self._attempt(job, attempt)
        closed = dict(found.closed)
        before = [replace(old, end=old.end or closed.get(old.number)) for old in record.since(self.job_id)]
        programs = (self.queue, self.shared, self.say)
        follow_up = FollowUp(self.folder, self.job_id, *programs, _ignore_signals, self.script)
        return follow_up.conclude(job, attempt, seen, before)

    def _lock(self) -> int:
        """Hold the job folder for this process, by the descriptor returned. UserError where another holds it."""
        self.folder.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                    os.close(descriptor)
                    raise UserError(
                        f"{self.folder.path}: {owner or 'another job'} works on it; expected no other: cancel one"
                    ) from None
                time.sleep(0.5)
        with suppress(OSError):  # on a full disk nobody can be told who holds it, but it is held
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"job {self.job_id} on {os.uname().nodename}\n".encode(), 0)
        return descriptor

    def _begin(self, job: Job, record: Record, step: int | None) -> Attempt:
        """Put the start on record."""
        attempt = Attempt(
            number=max((old.number for old in record.attempts), default=0) + 1,
            job=self.job_id,
            restart=int(self.environment.get("SLURM_RESTART_COUNT") or 0),
            hosts=tuple(hosts_of(self.environment["SLURM_JOB_NODELIST"])),
            step=step,
            time=time.time(),
        )
        if self.job_id not in record.started_before:
            self._ask(lambda: record_submission(self.folder.path, self.job_id, attempt.time))
        self._ask(lambda: record_start(self.folder.path, attempt))
        at = "" if step is None else f", from {step}" if job.verb != "train" else f", from step {step}"
        self.say(f"attempt {attempt.number} on {', '.join(attempt.hosts)}{at}")
        last = record.attempts[-1].end if record.attempts else None
        if last is not None and (again := [host for host in attempt.hosts if host in last.suspects]):
            self.say(f"the queue gave {', '.join(again)} again, though the last attempt asked for others")
        return attempt

    # The attempt.

    def _attempt(self, job: Job, attempt: Attempt) -> Seen:
        """Check the nodes and run the job's command; what was seen of it."""
        begin = time.monotonic()
        state_before = self._state(job)
        terms = Terms(attempt.number, job.limits, min(10.0, *(limit / 10 for limit in job.limits.values())))
        reports = self._check(job) if job.check and self.asked is None else NodeReports()
        silence, step = None, None
        code: int | None = None
        if reports.passed and self.asked is None:
            try:
                self._ask(lambda: terms.write(self.folder.heartbeats))
            except OSError as error:
                if isinstance(error, TimeoutError):
                    raise
                problem = f"{self.folder.heartbeats}: could not be written: {error.strerror or error}"
                spent = time.monotonic() - begin
                return Seen(EXIT_USER_ERROR, spent, self._progress(job), state_reason=problem)
            command = [*step_command(job), "-m", "ditmoe.launcher", *job.arguments]
            try:
                step = self.start_step(
                    command,
                    {**self.environment, FOLDER_VARIABLE: str(self.folder.heartbeats)},
                    self.say.pass_on,
                    self.wake.set,
                )
            except OSError as error:
                self.say(f"srun cannot be started: {error.strerror}")
                reports = NodeReports(problem=f"srun cannot be started: {error.strerror}")
            else:
                silence = self._watch(step, Watchdog(terms, time.monotonic(), job.verb != "workers"), terms)
                code = None if silence is not None else step.code
        details = self.queue.details(self.job_id)
        state = self._state(job)
        return Seen(
            exit_code=code,
            seconds=time.monotonic() - begin,
            step=self._progress(job),
            state=word_of(job, state, state_before, code),
            state_reason=reason_of(state, state_before) or (step.message if step is not None else ""),
            asked=self.asked,
            cancelled=self._cancelled() or (isinstance(details, dict) and is_cancelled(details, attempt.restart)),
            silence=silence,
            failed_nodes=reports.failed,
            check_failed=reports.problem,
            blamed=step.failure.hosts if step is not None and step.failure is not None else (),
            words=step.words if step is not None else "",
        )

    def _check(self, job: Job) -> NodeReports:
        """Let every node check itself."""
        hosts = hosts_of(self.environment["SLURM_JOB_NODELIST"])
        reports = NodeReports()
        command = check_command(step_command(job), self.folder.path, job.gpus_per_node, time.time())
        self.wake.clear()
        try:
            step = self.start_step(command, self.environment, self.say.pass_on, self.wake.set, reports.take)
        except OSError as error:
            return NodeReports(problem=f"srun cannot be started: {error.strerror}")
        deadline = time.monotonic() + CHECK_SECONDS
        while step.returned is None and self.asked is None and time.monotonic() < deadline:
            self.wake.wait(deadline - time.monotonic())
            self.wake.clear()
        late = step.returned is None and self.asked is None
        if step.returned is None:
            step.kill()
        if self.asked is None:
            reports.finish(hosts, CHECK_SECONDS if late else None, step.code, step.words)
            if not reports.passed:
                self.say(f"the check of the nodes failed: {reports.shown}")
        return reports

    def _watch(self, step: Step, watchdog: Watchdog, terms: Terms) -> Silence | None:
        """Wait for the end of the step: pass on a request to stop, and kill the tasks where ranks are silent."""
        passed_on, answered = False, time.monotonic()
        while step.returned is None:
            self.wake.wait(terms.interval)
            self.wake.clear()
            if self.asked is not None and not passed_on:
                self.say(f"{self.asked} came: the tasks are asked to save and end")
                step.ask_to_stop()
                passed_on = True
            silence = None
            try:
                beats = self._ask(lambda: read_heartbeats(self.folder.heartbeats, terms.attempt), terms.interval)
                answered = time.monotonic()
                silence = watchdog.look(beats, answered)
            except (TimeoutError, OSError) as error:
                waited = time.monotonic() - answered
                if waited > terms.limits["save"]:
                    silence = Silence(f"{self.folder.path} has not answered for {waited:.0f} s ({error})", ())
            if silence is not None and step.returned is None:
                self.say(f"{silence.reason}; all tasks are killed")
                step.kill()
                return silence
        return None

    # The shared folder.

    def _ask(self, call: Callable[[], T], seconds: float = FOLDER_SECONDS) -> T:
        return self.shared.ask(call, seconds)

    def _cancelled(self) -> bool:
        try:
            return self.job_id in self._ask(lambda: read_attempts(self.folder.path)).cancelled
        except (TimeoutError, UserError):
            return False

    def _progress(self, job: Job) -> int | None:
        try:
            return self._ask(lambda: progress(job, self.folder))
        except (TimeoutError, OSError):
            return None

    def _state(self, job: Job) -> dict[str, Any] | None:
        try:
            return self._ask(lambda: run_state(job))
        except TimeoutError:
            return None


def step_command(job: Job) -> list[str]:
    """srun for all tasks of the job, up to the Python of a task."""
    shape = [f"--nodes={job.nodes}", f"--ntasks-per-node={job.tasks_per_node}"]
    return ["srun", "--kill-on-bad-exit=1", *shape, *job.srun, *job.task]


def _ignore_signals() -> None:
    for number in HEARD:
        signal.signal(number, signal.SIG_IGN)


def _outlive_the_batch_script(supervisor: Supervisor) -> None:
    """Have the job queued again where its batch script is killed: at once, for Slurm ends this program then."""
    if not sys.platform.startswith("linux"):
        return

    def take(number: int, frame: FrameType | None) -> None:
        if os.getppid() != supervisor.script and supervisor.asked is None:
            supervisor.say("the batch script was killed: the job is queued again")
            threading.Thread(target=supervisor.queue.requeue, args=(supervisor.job_id,), daemon=True).start()
        supervisor.on_signal(number, frame)

    signal.signal(signal.SIGHUP, take)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP, 0, 0, 0)


def main() -> None:
    """Supervise one attempt; ends the process."""
    say = Teller()
    folder = opened(Path(sys.argv[1]).absolute())
    supervisor = Supervisor(folder, os.environ, Queue(), say)
    for number in HEARD:
        signal.signal(number, supervisor.on_signal)
    _outlive_the_batch_script(supervisor)
    try:
        code = supervisor.run()
    except UserError as error:
        say(f"error: {error}")
        code = EXIT_USER_ERROR
    except TimeoutError as error:
        say(f"error: {folder.path}: {error}; expected a shared folder that answers")
        code = 1
    say.finish()
    # Threads that wait for the shared folder would hold up the interpreter's own end.
    os._exit(code)


if __name__ == "__main__":
    main()
