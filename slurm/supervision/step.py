"""A step that srun runs: started, asked to stop, killed hard, and what srun says of tasks that failed."""

import re
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Final

from ditmoe.model.errors import UserError
from ditmoe.slurm.hostlist import hosts_of

ASK: Final = signal.SIGUSR2
"""What asks the tasks to save and end. srun passes it on; at a SIGTERM it would kill them at once."""
KILL_SECONDS: Final = 60.0
"""That srun has to come back once it was told to end its tasks hard."""
_TAIL_LINES: Final = 40
_FAILED_TASKS: Final = re.compile(r"srun: error: ([^\s:]+): tasks? [\d,\-]+: (.+)")
_EXITED: Final = re.compile(r"Exited with exit code (\d+)")
_SIGNALS: Final = {signal.strsignal(number): int(number) for number in signal.Signals}


@dataclass(frozen=True)
class TaskFailure:
    """Tasks of which srun says that they failed."""

    hosts: tuple[str, ...]
    code: int | None
    """128 + N where signal N ended them; None: srun's words are of no kind that is known here."""
    words: str


def task_failure(line: str) -> TaskFailure | None:
    """What a line of srun's says of tasks that failed; None where it is another."""
    match = _FAILED_TASKS.match(line.strip())
    if match is None:
        return None
    try:
        hosts = tuple(hosts_of(match[1]))
    except UserError:
        return None
    exited = _EXITED.match(match[2])
    name = match[2].removesuffix(" (core dumped)")
    code = int(exited[1]) if exited else 128 + _SIGNALS[name] if name in _SIGNALS else None
    return TaskFailure(hosts, code, line.strip().removeprefix("srun: error: "))


def user_message(lines: Sequence[str]) -> str:
    """The first message of a user's error among the lines of all tasks, with the indented lines below it, in one.

    Each task prints the same, perhaps at the same time.
    """
    first, more = "", dict[str, None]()
    for line in lines:
        if not first and line.startswith("error: "):
            first = line.strip()
        elif first and line[:1].isspace() and line.strip():
            more[line.strip()] = None
        elif first and line.strip() != first:
            break
    return ": ".join(filter(None, (first.removeprefix("error: "), "; ".join(more))))


class Step:
    """A step that runs. `ended` is called, from a thread, when it has ended.

    Args:
        command: srun and its arguments.
        environment: of the step.
        show: takes each line of its errors, with the newline.
        ended: called once srun has come back.
        take: takes each line of its output; None: that goes where this process's goes.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        show: Callable[[str], None],
        ended: Callable[[], None],
        take: Callable[[str], None] | None = None,
    ) -> None:
        self._show, self._ended, self._take = show, ended, take
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._told: list[str] = []
        """What came from the first message of a user's error on."""
        self._first: TaskFailure | None = None
        self._finished = threading.Event()
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=None if take is None else subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        self._readers = [threading.Thread(target=self._read_errors, daemon=True)]
        if take is not None:
            self._readers.append(threading.Thread(target=self._read_output, daemon=True))
        for reader in self._readers:
            reader.start()
        threading.Thread(target=self._wait, daemon=True).start()

    @property
    def returned(self) -> int | None:
        """srun's exit code; None while it runs, or what it said last is still being read."""
        return self._process.returncode if self._finished.is_set() else None

    @property
    def failure(self) -> TaskFailure | None:
        """The first tasks that failed: others fail after them, and those that srun ends with them say so too."""
        return self._first

    @property
    def code(self) -> int | None:
        """The exit code of the tasks: that of the first that failed, 128 + N where signal N ended it."""
        returned = self.returned
        if returned and self._first is not None and self._first.code is not None:
            return self._first.code
        return 128 - returned if returned is not None and returned < 0 else returned

    @property
    def words(self) -> str:
        """What was said last of a failure."""
        if self._first is not None:
            return self._first.words
        errors = [line.strip() for line in self._tail if "error:" in line]
        return errors[0].removeprefix("srun: error: ") if errors else ""

    @property
    def message(self) -> str:
        """The message of a user's error that a task printed, in one line; empty where there is none."""
        return user_message(tuple(self._told))

    def ask_to_stop(self) -> None:
        """Ask all tasks to save and end."""
        self._process.send_signal(ASK)

    def kill(self) -> None:
        """Kill all tasks at once, and srun itself where it does not come back."""
        # At this srun has every node kill its tasks by SIGKILL, which reaches stopped and blocked ones too.
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._finished.wait()

    def _wait(self) -> None:
        self._process.wait()
        for reader in self._readers:
            reader.join(2.0)  # a process that a task has left behind may hold the pipe
        self._finished.set()
        self._ended()

    def _read_errors(self) -> None:
        for line in _lines(self._process.stderr):
            self._tail.append(line)
            # Other tasks may print long tracebacks after it.
            if (self._told or line.startswith("error: ")) and len(self._told) < _TAIL_LINES:
                self._told.append(line)
            if self._first is None:
                self._first = task_failure(line)
            self._show(line)

    def _read_output(self) -> None:
        assert self._take is not None
        for line in _lines(self._process.stdout):
            self._take(line)


def _lines(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
