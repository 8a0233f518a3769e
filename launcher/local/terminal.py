"""Standard output and error: they take any text, and nobody has to read them.

Characters that the terminal's encoding lacks are written as escapes. Where standard error is closed, messages are
lost. Where standard output is closed, a command ends as every filter does, but a training run goes on and says so
in its log (`launcher/training/report.py`).
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
    """Discard what is written to a stream from now on, at exit too, when its buffer could not be written."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Unheard(io.TextIOWrapper):
    """Standard error that may fail, closed or on a full disk: there is nobody else to tell."""

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
