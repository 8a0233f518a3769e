"""How a run is asked to stop, and how it says that it was: signals and exit codes."""

import signal
from typing import Final

STOP_SIGNALS: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
    signal.SIGALRM,
)
"""Ctrl-C; the end that anybody asks for; a terminal that is gone; a batch system's warnings; limits of time."""

EXIT_STOPPED: Final = 75
"""Exit code of a run that was asked to stop and has saved what it had: repeated, the command goes on.

EX_TEMPFAIL of sysexits.h. A run that is complete exits with 0, and one that a signal ended with 128 + its number.
"""


def was_stopped(code: int) -> bool:
    """Whether an exit code says that somebody asked for the end, whether anything was saved or not."""
    return code == EXIT_STOPPED or code - 128 in STOP_SIGNALS
