"""Files from the output of a shell command (`pipe:COMMAND {}`)."""

import os
import select
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Final

from ditmoe.data.places.redaction import masked, program_of
from ditmoe.data.places.transports.base import CHUNK, Broken, Refused, Reply, Stop
from ditmoe.model.errors import UserError

PLACEHOLDER: Final = "{}"
NOT_RUN: Final = (126, 127)
"""A shell's codes for a command that cannot be run, or is not there."""
LAST_WORDS: Final = 2000
"""Bytes at the end of a command's error output that its last line is looked for in."""

SCRIPT: Final = """
exec 3<&0 </dev/null
{ read -r _ <&3; kill -KILL 0; } >/dev/null 2>&1 &
watch=$!
exec 3<&-
sh -c "$1"
code=$?
kill -KILL $watch
wait $watch 2>/dev/null
exit $code
"""
"""Runs a command in a process group of its own. Its input is a pipe that nobody writes to: it ends when this
program does, be it by kill -9, and then all of the group is killed."""


class Command:
    """A shell command that writes a file to its output."""

    def __init__(self, command: str, timeout: float) -> None:
        """UserError when it does not say where the file's name goes."""
        self._program = program_of(command)  # the rest may hold passwords
        if PLACEHOLDER not in command:
            raise UserError(
                f"data.sources: path: pipe:{self._program} … has no {PLACEHOLDER}: expected a command with "
                f"{PLACEHOLDER} where the file's name goes, such as 'pipe:ssh host cat shards/{PLACEHOLDER}'"
            )
        self._command = command
        self._timeout = timeout

    def where(self, name: str) -> str:
        """The program, without its arguments, and the file."""
        return f"pipe:{self._program} … {name}"

    @contextmanager
    def open(self, name: str, start: int, tag: str | None, stop: Stop) -> Iterator[Reply]:
        """Start the command; it always begins at the file's start."""
        command = self._command.replace(PLACEHOLDER, shlex.quote(name))
        with tempfile.TemporaryFile() as errors:
            try:
                process = subprocess.Popen(
                    ["/bin/sh", "-c", SCRIPT, "sh", command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,
                )
            except OSError as error:  # of this machine: no process or no descriptor is left
                raise UserError(f"{self.where(name)}: could not be started: {error.strerror or error}") from error
            try:
                with stop.calling(lambda: _kill(process)):
                    yield Reply(0, None, None, self._chunks(process, errors, stop))
            finally:
                _kill(process)  # with whatever it left behind
                for stream in (process.stdin, process.stdout):
                    assert stream is not None
                    stream.close()
                process.wait()

    def _chunks(self, process: subprocess.Popen[bytes], errors: IO[bytes], stop: Stop) -> Iterator[bytes]:
        assert process.stdout is not None
        output = process.stdout.fileno()
        poll = select.poll()
        poll.register(output, select.POLLIN)
        while True:
            if not poll.poll(self._timeout * 1000):
                raise Broken(f"no byte for {self._timeout:g} seconds")
            data = os.read(output, CHUNK)
            if not data:
                break
            yield data
        code = _exit_code(process)
        stop.check()  # then it was killed
        if code:
            reason = f"the command ended with code {code}{_last_words(errors)}"
            raise Refused(reason) if code in NOT_RUN else Broken(reason)


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """Of a shell that has closed its output, as its last act.

    It is left in the process table: as long as it is there, its number is its group's and no one else's.
    """
    result = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert result is not None
    return result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_words(errors: IO[bytes]) -> str:
    """The last line that a command said, without secrets."""
    size = os.fstat(errors.fileno()).st_size
    text = os.pread(errors.fileno(), LAST_WORDS, max(0, size - LAST_WORDS)).decode(errors="replace").strip()
    return f": {masked(text.splitlines()[-1])[:300]}" if text else ""
