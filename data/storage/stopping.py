"""The signals that ask a run to stop, for who obeys them and who leaves them to others."""

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
