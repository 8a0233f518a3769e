"""Starts the processes of one run on this machine, and ends all of them when one fails or a stop is asked for.

Each is `python -m ditmoe.launcher VERB …` with the variables that torchrun would set. A terminal's Ctrl-C reaches
only the starting process, which asks all the others to stop. Where srun has started one process on each of several
nodes, each starts the ranks of its node.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from ditmoe.data.storage.files import open_appending
from ditmoe.data.storage.stopping import EXIT_STOPPED, STOP_SIGNALS
from ditmoe.launcher.local.failures import FAILURE_VARIABLE, Failure, read_failure
from ditmoe.launcher.local.signals import ASKED_VARIABLE, PARENT_VARIABLE, REPEAT_SECONDS
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import message_lines, printable
from ditmoe.parallel.ranks import MEETING_VARIABLE, NODE_TASK_VARIABLE, ThisProcess, this_process

PROGRAM: Final = (sys.executable, "-m", "ditmoe.launcher")
GRACE_SECONDS: Final = 10.0
"""Between SIGTERM and SIGKILL to the others when one process has failed."""
_POLL_SECONDS: Final = 0.05
_TAIL_LINES: Final = 30


def spawn(
    arguments: Sequence[str],
    processes: int,
    *,
    log_dir: Path | None = None,
    threads: int | None = None,
    environment: Mapping[str, str] | None = None,
    program: Sequence[str] = PROGRAM,
    grace: float = GRACE_SECONDS,
    quiet: bool = False,
) -> int:
    """Start `processes` copies of a command of ours and wait for them: the exit code.

    Rank 0 shares this process's output; rank N appends to `log_dir/rank-N.txt`. Where each node has a task
    like this one, the ranks are those of its node, and all nodes start as many.

    Args:
        arguments: verb and arguments.
        processes: how many on this machine.
        log_dir: folder of the other ranks' output; None: a temporary one.
        threads: OMP_NUM_THREADS of each; None: as it is set now, or cores / processes.
        environment: further variables.
        program: what is started, before the arguments.
        grace: seconds between SIGTERM and SIGKILL to the others when one has failed.
        quiet: show nothing of what rank 0 prints to its standard output; its errors are shown.

    Returns:
        0 when all ended well; `EXIT_STOPPED` when they were asked to stop and have saved; the code of the first
        that failed (128 + N when signal N ended it), after its message was shown and the others were ended;
        128 + N when signal N to this process ended them early.
    """
    process = this_process()
    task = process if process.node_task else ThisProcess()
    first = task.rank * processes
    with _scratch_folder() as scratch:
        group = _Group(Path(scratch), log_dir or Path(scratch), grace, quiet)
        base = _environment(task, processes, threads, environment or {})
        # What is ignored stays so: nohup ignores SIGHUP.
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        handlers = {number: signal.signal(number, group.on_signal) for number in heard}
        try:
            for local_rank in range(processes):
                group.start(first + local_rank, local_rank, [*program, *arguments], base)
            return group.wait()
        finally:
            group.kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _scratch_folder() -> "tempfile.TemporaryDirectory[str]":
    """A folder for the messages of ranks to this process. UserError where the system has no room for one."""
    try:
        return tempfile.TemporaryDirectory(prefix="ditmoe-launch-", ignore_cleanup_errors=True)
    except OSError as error:  # FileNotFoundError where none of the usual folders can be written
        raise UserError(f"TMPDIR: no folder for temporary files could be made: {error.strerror}") from error


@dataclass
class _Rank:
    """One started process."""

    number: int
    process: subprocess.Popen[bytes]
    failure_path: Path
    log_path: Path | None
    """Its output; None: this process's."""
    log_start: int
    """Where this start's output begins in the file."""


@dataclass
class _Group:
    """All the processes of one start."""

    scratch: Path
    log_dir: Path
    grace: float
    quiet: bool = False
    ranks: list[_Rank] = field(default_factory=list)
    asked: signal.Signals | None = None
    """The first signal that asked this process for a stop."""
    asked_seconds: float = 0.0
    """When it came, on the monotonic clock."""

    def start(self, rank: int, local_rank: int, command: list[str], base: Mapping[str, str]) -> None:
        """Start one process."""
        failure_path = self.scratch / f"failure-{rank}.json"
        own = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), FAILURE_VARIABLE: str(failure_path)}
        own[ASKED_VARIABLE] = str(self._asked_path)
        output: dict[str, Any] = {"stdout": subprocess.DEVNULL} if self.quiet else {}
        log_path, log_start = None, 0
        if rank:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            log_path = self.log_dir / f"rank-{rank}.txt"
            file = open_appending(log_path)  # closed below, once the process has it
            log_start = file.tell()
            output = {"stdout": file, "stderr": subprocess.STDOUT}
        try:
            # Its own session: the terminal's Ctrl-C does not reach it, and its children can be ended with it.
            process = subprocess.Popen(
                command, env={**base, **own}, stdin=subprocess.DEVNULL, start_new_session=True, **output
            )
        finally:
            if rank:
                output["stdout"].close()
        self.ranks.append(_Rank(rank, process, failure_path, log_path, log_start))

    def wait(self) -> int:
        """Wait for all; on the first failure end the others and show its message."""
        while True:
            codes = [rank.process.poll() for rank in self.ranks]
            if any(code not in (None, 0, EXIT_STOPPED) for code in codes):
                return self._fail()
            if None not in codes:
                return EXIT_STOPPED if EXIT_STOPPED in codes else 0
            time.sleep(_POLL_SECONDS)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on to all; the second Ctrl-C kills them."""
        if number == signal.SIGINT and self.asked == signal.SIGINT:
            if time.monotonic() - self.asked_seconds > REPEAT_SECONDS:
                self.kill()
            return
        if self.asked is None:
            self.asked, self.asked_seconds = signal.Signals(number), time.monotonic()
            if number == signal.SIGINT:
                print("\nstopping; Ctrl-C again kills all processes at once", file=sys.stderr)
            with suppress(OSError):  # on a full disk they say which signal reached them
                self._asked_path.write_text(self.asked.name, encoding="ascii")
        # Ranks hear the second Ctrl-C from here alone, so the first is to them an ordinary end.
        self._send(signal.SIGTERM if number == signal.SIGINT else signal.Signals(number))

    @property
    def _asked_path(self) -> Path:
        return self.scratch / "asked"

    def kill(self) -> None:
        """Kill all that still run, and the processes that they started."""
        for rank in self.ranks:
            if rank.process.poll() is None:
                _signal_group(rank.process.pid, signal.SIGKILL)
                rank.process.wait()

    def _send(self, number: signal.Signals) -> None:
        for rank in self.ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    def _fail(self) -> int:
        """Find the first failure, end the others, show the message; the exit code."""
        failed = [rank for rank in self.ranks if rank.process.poll() not in (None, 0, EXIT_STOPPED)]
        # A rank may have written its failure and not have ended yet.
        failures = [read_failure(rank.failure_path) for rank in self.ranks]
        self._end_others()
        # Nothing but a signal from outside ends a process so early; the others' failures follow from it.
        killed = [rank for rank in failed if rank.process.returncode < 0]
        if self.asked is not None and (killed or not any(failures)):
            if self.asked != signal.SIGINT:
                print(f"ended by {self.asked.name}", file=sys.stderr)
            return 128 + self.asked
        if killed:
            return self._show(killed[0], None)
        written = [(f.seconds, place) for place, f in enumerate(failures) if f is not None]
        if written:
            _, place = min(written)
            return self._show(self.ranks[place], failures[place])
        return self._show(failed[0], None)

    def _end_others(self) -> None:
        """SIGTERM, then SIGKILL."""
        self._send(signal.SIGTERM)
        deadline = time.monotonic() + self.grace
        while time.monotonic() < deadline and any(rank.process.poll() is None for rank in self.ranks):
            time.sleep(_POLL_SECONDS)
        self.kill()

    def _show(self, rank: _Rank, failure: Failure | None) -> int:
        """Show why a rank failed; its exit code."""
        code = failure.code if failure is not None else rank.process.returncode
        if failure is not None and failure.code == 2:
            print(f"error: {message_lines(failure.message)}", file=sys.stderr)
            return code
        if failure is not None and rank.log_path is None:
            print(failure.message, file=sys.stderr)
        if rank.log_path is not None:
            for line in _tail(rank.log_path, rank.log_start):
                print(f"[rank {rank.number}] {printable(line)}", file=sys.stderr)
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (the system kills so when memory runs out)" if name == "SIGKILL" else ""
            end, code = f"was killed by {name}{hint}", 128 - code
        else:
            end = f"failed with exit code {code}"
        others = "; the others were ended" if len(self.ranks) > 1 else ""
        print(f"error: rank {rank.number} {end}{others}", file=sys.stderr)
        if self.log_dir != self.scratch:
            print(f"output of the other ranks: {self.log_dir}/rank-N.txt", file=sys.stderr)
        return code


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def threads_per_process(processes: int) -> int:
    """The cores that this process may use, divided by the number of processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


def _environment(
    task: ThisProcess, processes: int, threads: int | None, extra: Mapping[str, str]
) -> dict[str, str]:
    """The variables that all ranks of this machine share."""
    environment = {
        "OMP_NUM_THREADS": str(threads_per_process(processes)),
        **os.environ,
        "WORLD_SIZE": str(task.ranks * processes),
        "LOCAL_WORLD_SIZE": str(processes),
        PARENT_VARIABLE: str(os.getpid()),
        # What a killed process printed is not lost in its buffer.
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop(NODE_TASK_VARIABLE, None)
    if not task.started:
        # One machine: gloo need not look for the address of its name.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform.startswith("linux") else "lo0")
        environment |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            MEETING_VARIABLE: f"local.{secrets.token_hex(8)}",
        }
    environment.update(extra)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return  # it has just ended


def _tail(path: Path, start: int) -> list[str]:
    """The last lines of a file after its first `start` bytes."""
    with open(path, "rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
