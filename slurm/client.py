"""The one place that runs Slurm's programs: sbatch, squeue, scontrol, sacct, scancel and sinfo.

Questions are answered with what the queue knows, or with `Unseen` and why: a program may be missing on a compute
node, accounting is off in many clusters, and a controller that restarts does not answer for a while. Orders
(`submit`, `requeue`, …) raise UserError: without Slurm, or a controller that answers, with what is missing, else
with the program's own words.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import printable
from ditmoe.slurm.hostlist import hosts_of

ASK_SECONDS: Final = 30.0
"""The longest that a question may take: a status is of use only when it comes."""
ORDER_SECONDS: Final = 120.0
"""The longest that an order may take: Slurm's programs repeat one themselves while the controller is busy."""

ENDED_STATES: Final = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)
"""States of a job that has ended; a requeued one leaves them again."""

_NEVER: Final = (
    *("DependencyNeverSatisfied", "BadConstraints", "JobHeldUser", "JobHeldAdmin", "InactiveLimit"),
    *("PartitionTimeLimit", "PartitionNodeLimit", "PartitionConfig", "PartitionInactive", "PartitionDown"),
    *("AccountNotAllowed", "QOSNotAllowed", "InvalidAccount", "InvalidQOS", "launch_failed_requeued_held"),
    *("job_requeued_in_held_state", "ReqNodeNotAvail", "AssocMaxCpuMinutesPerJobLimit", "AssocMaxNodePerJobLimit"),
)
"""Reasons of Slurm for which a job does not start unless somebody does something."""

_SEPARATOR: Final = "\x1f"
"""Between the columns of squeue: a job's name may hold any character that a terminal shows."""
_QUEUE_COLUMNS: Final = _SEPARATOR.join(("%i", "%T", "%r", "%N", "%V", "%S", "%e", "%j"))
_ACCOUNT_COLUMNS: Final = "JobID,State,ExitCode,NodeList,Submit,Start,End,Reason,JobName"
_UNKNOWN_JOB: Final = "invalid job id specified"

_A_CLUSTER: Final = "a machine of a Slurm cluster that submits jobs, such as its login node"
_A_CONTROLLER: Final = "a controller that answers: `scontrol ping` says whether it is up"
_NO_CONFIGURATION: Final = "Could not establish a configuration source"
"""What the programs say where there is no slurm.conf, after several lines about where they looked."""
_NO_CONTROLLER: Final = re.compile(
    r"Unable to contact slurm controller(?: \([^)]*\))?|Socket timed out on send/recv operation"
    r"|Zero Bytes were transmitted or received|Slurm backup controller in standby mode"
)
_FIELD: Final = re.compile(r"(?:^|\s)([A-Za-z][\w:/]*)=")


@dataclass(frozen=True)
class Unseen:
    """No answer, and why: never to be taken for good news."""

    reason: str
    """What was found."""
    expected: str = ""
    """What was expected in its place; empty: the reason leaves nothing to add."""

    @property
    def problem(self) -> str:
        """Both, for a message."""
        return f"{self.reason}; expected {self.expected}" if self.expected else self.reason


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue or sacct has it. Times are seconds since 1970; None: not known, or not yet decided."""

    job: str
    """`123`; of an array `123_4`."""
    state: str
    """Slurm's word in full, such as PENDING, RUNNING, COMPLETING, TIMEOUT."""
    reason: str
    """Why it waits or has ended, such as Priority, Dependency, QOSMaxJobsPerUserLimit; empty: none."""
    hosts: tuple[str, ...]
    """On which it runs, or ran last."""
    submitted: float | None
    starts: float | None
    """When it started; of a job that waits, when the queue expects that."""
    ends: float | None
    """When it ended; of a job that runs, when its time is up."""
    exit_code: int | None = None
    """Of the batch script; None: it has not ended, or the queue does not say."""
    name: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.state in ENDED_STATES

    @property
    def never_starts(self) -> bool:
        """Whether it waits for something that does not come about by itself."""
        return self.state == "PENDING" and self.reason.split(",")[0] in _NEVER


@dataclass(frozen=True)
class Output:
    """What a program printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """What it said went wrong, in one line."""
        lines = [printable(line.strip()) for line in (self.err or self.out).splitlines()]
        return "; ".join(line for line in lines if line) or f"exit code {self.code}"


Runner = Callable[[Sequence[str], float], "Output | Unseen"]
"""Runs a program (its name and arguments) for at most so many seconds."""


def run_program(command: Sequence[str], seconds: float) -> Output | Unseen:
    """Run one of Slurm's programs to its end; `Unseen`: it is missing, takes too long, or finds no Slurm."""
    try:
        done = subprocess.run(
            list(command),
            env=_environment(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
        )
    except OSError as error:
        if shutil.which(command[0]) is None:
            return Unseen(f"{command[0]} is not on the PATH", _A_CLUSTER)
        return Unseen(f"{command[0]} cannot be run: {error.strerror}", _A_CLUSTER)
    except subprocess.TimeoutExpired:
        return Unseen(f"{command[0]} gave no answer within {seconds:.0f} s", _A_CONTROLLER)
    output = Output(done.returncode, done.stdout, done.stderr)
    return _without_slurm(command[0], output) or output


def _without_slurm(program: str, output: Output) -> Unseen | None:
    """What a program's failure says of Slurm itself; None: it did not fail, or for another reason."""
    if not output.code:
        return None
    if _NO_CONFIGURATION in output.err:
        return Unseen(f"{program} finds no configuration of Slurm (slurm.conf)", _A_CLUSTER)
    silent = _NO_CONTROLLER.search(output.err)
    return Unseen(f"{program} gets no answer from Slurm: {silent[0]}", _A_CONTROLLER) if silent else None


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Without a user's settings of these programs, which filter and format what they print or make them ask."""
    own = ("SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_", "SCONTROL_")
    kept = {key: value for key, value in variables.items() if not key.startswith(own)}
    return {**kept, "SLURM_TIME_FORMAT": "%s"}


class Queue:
    """Slurm as its programs on this machine speak to it.

    Args:
        run: runs a program; tests give another.
    """

    def __init__(self, run: Runner = run_program) -> None:
        self._run = run

    # Questions.

    def jobs(self, jobs: Sequence[str]) -> dict[str, QueuedJob] | Unseen:
        """What squeue has of these jobs, by their ids: all that have not ended, and some that have lately.

        Args:
            jobs: ids; that of an array stands for all its elements.
        """
        if not jobs:
            return {}
        command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(jobs)}"]
        answer = self._ask([*command, f"--format={_QUEUE_COLUMNS}"])
        if isinstance(answer, Output) and _UNKNOWN_JOB in answer.words.lower():
            return {}
        return answer if isinstance(answer, Unseen) else _read("squeue", _queued, answer.out)

    def named(self, *names: str) -> dict[str, QueuedJob] | Unseen:
        """What squeue has of the jobs of these names, of all users, by their ids; also some that ended lately."""
        if not names:
            return {}
        command = ["squeue", "--noheader", "--array", "--states=all", f"--name={','.join(names)}"]
        answer = self._ask([*command, f"--format={_QUEUE_COLUMNS}"])
        return answer if isinstance(answer, Unseen) else _read("squeue", _queued, answer.out)

    def accounted(self, jobs: Sequence[str]) -> dict[str, QueuedJob] | Unseen:
        """What the accounting has of these jobs, by their ids; of a requeued job the latest."""
        if not jobs:
            return {}
        command = ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={','.join(jobs)}"]
        answer = self._ask([*command, f"--format={_ACCOUNT_COLUMNS}"])
        return answer if isinstance(answer, Unseen) else _read("sacct", _accounted, answer.out)

    def details(self, job: str) -> dict[str, str] | Unseen | None:
        """What `scontrol show job` has of a job, by its own names (JobState, Restarts, ExcNodeList, …).

        None: the controller does not know the job, as of one that ended some minutes ago.
        """
        answer = self._ask(["scontrol", "--oneliner", "show", "job", job])
        if isinstance(answer, Output) and _UNKNOWN_JOB in answer.words.lower():
            return None
        return answer if isinstance(answer, Unseen) else _fields(answer.out)

    def excluded(self, job: str) -> tuple[str, ...] | Unseen:
        """The nodes that a job will not be given."""
        details = self.details(job)
        if details is None:
            return Unseen(f"scontrol does not know job {job}")
        return details if isinstance(details, Unseen) else _hosts(details.get("ExcNodeList", ""))

    def node_states(self, hosts: Sequence[str]) -> dict[str, str] | Unseen:
        """What sinfo says of nodes: idle, allocated, down*, drained, …; without those that it does not know."""
        if not hosts:
            return {}
        answer = self._ask(["sinfo", "--noheader", "--Node", f"--nodes={','.join(hosts)}", "--format=%N %T"])
        if isinstance(answer, Unseen):
            return answer
        pairs = (line.split() for line in answer.out.splitlines())
        return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}

    def partition_hosts(self, partition: str) -> tuple[str, ...] | Unseen:
        """The nodes of a partition, or of several with commas between them, that are not down or drained."""
        command = ["sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %T"]
        answer = self._ask(command)
        if isinstance(answer, Unseen):
            return answer
        pairs = (line.split() for line in answer.out.splitlines())
        up = [pair[0] for pair in pairs if len(pair) == 2 and not pair[1].startswith(("down", "drain", "fail"))]
        return tuple(dict.fromkeys(up))

    def _ask(self, command: Sequence[str]) -> Output | Unseen:
        """What a program prints; a refusal is no answer, but for one that names an unknown job."""
        output = self._run(command, ASK_SECONDS)
        if isinstance(output, Output) and output.code and _UNKNOWN_JOB not in output.words.lower():
            return Unseen(_complaint(command, output))
        return output

    # Orders.

    def submit(self, script: Path, options: Sequence[str] = (), arguments: Sequence[str] = ()) -> str:
        """Hand a batch script to Slurm; returns the job's id.

        Args:
            script: the batch script.
            options: of sbatch; they go before those that the script has.
            arguments: of the script.
        """
        output = self._order(["sbatch", "--parsable", *options, str(script), *arguments])
        job = output.out.strip().splitlines()[-1].partition(";")[0] if output.out.strip() else ""
        if not job.isdecimal():
            raise UserError(f"sbatch: {output.words!r}; expected the number of a job")
        return job

    def requeue(self, job: str) -> None:
        """Put a job back into the queue; one that runs is ended at once, its batch script too."""
        self._order(["scontrol", "requeue", job])

    def exclude(self, job: str, hosts: Sequence[str]) -> tuple[str, ...]:
        """Ask that a job is not given these nodes; returns those that the queue then says it will not be given."""
        self._order(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(hosts)}"])
        excluded = self.excluded(job)
        if isinstance(excluded, Unseen):
            raise UserError(excluded.problem)
        return excluded

    def signal(self, job: str, signal: str, steps: bool = False) -> None:
        """Send a signal (`TERM`) to the batch script of a job alone, or to all processes of its steps alone."""
        self._order(["scancel", *([] if steps else ["--batch"]), f"--signal={signal}", job])

    def cancel(self, job: str) -> None:
        """End a job for good, or take it out of the queue: SIGTERM, and SIGKILL after the cluster's KillWait."""
        self._order(["scancel", job])

    def _order(self, command: Sequence[str]) -> Output:
        output = self._run(command, ORDER_SECONDS)
        if isinstance(output, Unseen):
            raise UserError(output.problem)
        # scancel says what it could not do, and some versions end with 0 then.
        if output.code or output.err.lower().startswith(f"{command[0]}: error"):
            raise UserError(_complaint(command, output))
        return output


def _complaint(command: Sequence[str], output: Output) -> str:
    """What a program says went wrong, after its name."""
    words = re.sub(rf"(^|; ){re.escape(command[0])}: (error: )?", r"\1", output.words)
    return f"{command[0]}: {words}"


def _read(program: str, reader: Callable[[str], QueuedJob], text: str) -> dict[str, QueuedJob] | Unseen:
    """The jobs of a table, one a line, by their ids."""
    try:
        jobs = [reader(line) for line in text.split("\n") if line]
    except (ValueError, UserError):
        return Unseen(
            f"{program} printed {printable(text.strip())!r:.200}; expected the columns that were asked for"
        )
    return {job.job: job for job in jobs}


def _queued(line: str) -> QueuedJob:
    """A line of squeue. ValueError or UserError: it is none."""
    job, state, reason, hosts, submitted, starts, ends, name = line.split(_SEPARATOR, 7)
    return _job(job, state, reason, hosts, (submitted, starts, ends), None, name)


def _accounted(line: str) -> QueuedJob:
    """A line of sacct. ValueError or UserError: it is none."""
    job, state, code, hosts, submitted, starts, ends, reason, name = line.split("|", 8)
    state = state.partition(" ")[0]  # of `CANCELLED by 1000`
    exit_code = _exit_code(code) if state in ENDED_STATES else None
    return _job(job, state, reason, hosts, (submitted, starts, ends), exit_code, name)


def _job(
    job: str, state: str, reason: str, hosts: str, times: tuple[str, str, str], exit_code: int | None, name: str
) -> QueuedJob:
    """A job of the columns that squeue and sacct have in common; `times`: submitted, starts, ends."""
    submitted, starts, ends = map(_time, times)
    return QueuedJob(job, state, _reason(reason), _hosts(hosts), submitted, starts, ends, exit_code, name)


def _exit_code(text: str) -> int:
    """Of `CODE:SIGNAL`, as a shell would have it."""
    code, signal = map(int, text.split(":"))
    return 128 + signal if signal else code


def _fields(text: str) -> dict[str, str]:
    """`Name=value Name=value` of scontrol; values may have spaces and equals signs, names have none."""
    starts = list(_FIELD.finditer(text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    found: dict[str, str] = {}
    for match, end in zip(starts, ends, strict=True):
        found.setdefault(match[1], text[match.end() : end].strip())
    return found


def _reason(word: str) -> str:
    return "" if word.strip() in ("None", "(null)", "") else printable(word.strip())


def _hosts(hostlist: str) -> tuple[str, ...]:
    """No host where there is none yet."""
    if hostlist.strip() in ("", "(null)", "None assigned", "n/a", "N/A"):
        return ()
    return tuple(hosts_of(hostlist.strip()))


def _time(word: str) -> float | None:
    """Seconds since 1970; None for N/A, Unknown and their kind."""
    return float(word) if word.strip().isdecimal() and int(word) else None
