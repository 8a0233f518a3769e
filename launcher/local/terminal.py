"""Standard output and error: any text can be written to them, and nobody has to read them.

Characters that the terminal's encoding lacks are written as escapes. Where standard error is closed, messages go
nowhere; where standard output is closed, a command ends as every filter does, except that a run of days goes on
and says so in its log (`launcher/training/report.py`).
"""

import errno
import io
import os
import sys
from typing import Final, TextIO

CLOSED: Final = (errno.EPIPE, errno.EIO, errno.EBADF)
"""What writing to a pipe without a reader, or to a terminal that is gone, fails with."""


def prepare_streams() -> None:
    """Make this process's standard streams take any text, also where they were closed before it started."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115 - for the process's life
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        encoding = sys.stderr.encoding
        sys.stderr = _Unheard(
            sys.stderr.detach(), encoding, "backslashreplace", line_buffering=True, write_through=True
        )


def let_go(stream: TextIO) -> None:
    """Write a stream nowhere from now on, at exit too, where what is left in its buffer could not be written."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Unheard(io.TextIOWrapper):
    """Standard error: there is nobody else to tell when it cannot be written, closed or on a full disk."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError:
            let_go(self)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            let_go(self)


def is_closed(error: OSError) -> bool:
    """Whether a stream could not be written because nobody reads it any more."""
    return error.errno in CLOSED
