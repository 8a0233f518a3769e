"""Signals: a training process stops at the next step, and no process outlives the one that started it.

Whoever asks a run to end gets a checkpoint first: an impatient user, a lost terminal, a batch system's warning, a
limit on processor time. Only SIGKILL, SIGQUIT (Ctrl-\\) and a second Ctrl-C end a run at once.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, Self

from ditmoe.data.storage.stopping import STOP_SIGNALS

PARENT_VARIABLE: Final = "DITMOE_PARENT"
"""Environment variable of a started process: the process that it ends with."""
ASKED_VARIABLE: Final = "DITMOE_ASKED"
"""Environment variable of a started process: the file where the starting one names the signal that it got, before
it passes it on: Ctrl-C becomes SIGTERM."""

REPEAT_SECONDS: Final = 0.5
"""A second Ctrl-C sooner than this is the first one again: `timeout` and some terminals send it twice."""

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


@contextmanager
def ending_orderly() -> Iterator[None]:
    """Within this context SIGTERM and SIGHUP end the process as an error does: what it has begun is ended first.

    The exit code is 128 + their number, as a shell has it of a process that a signal killed. A second one changes
    nothing, and one that is ignored stays so.
    """
    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]

    def end(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = [signal.signal(each, end) for each in numbers]
    try:
        yield
    finally:
        for each, handler in zip(numbers, before, strict=True):
            signal.signal(each, handler)


class StopSignal:
    """Within this context `STOP_SIGNALS` ask for a stop instead of ending the process.

    Signals that are ignored stay ignored: nohup ignores SIGHUP. A second SIGINT (Ctrl-C) raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """Name of the first signal that came, here or to the starting process; None: no stop is asked for."""
        self._before: dict[int, Any] = {}
        self._seconds = 0.0

    @property
    def requested(self) -> bool:
        """Whether a stop is asked for."""
        return self.name is not None

    def __enter__(self) -> Self:
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name, self._seconds = _passed_on() or signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._seconds > REPEAT_SECONDS:
            raise KeyboardInterrupt


def keep_exit_code() -> None:
    """Let no signal change how this process ends: srun sends one to the others as soon as one task has ended."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _passed_on() -> str | None:
    """Name of the signal that the starting process got; None: it got none, and this one came from elsewhere."""
    file = os.environ.get(ASKED_VARIABLE)
    if file is None:
        return None
    try:
        name = Path(file).read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return name if name in signal.Signals.__members__ else None


def end_with_parent() -> None:
    """In a process that `spawn` started: receive SIGTERM when the starting process ends, however it ends."""
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # It may have ended before the call above.
    if os.getppid() != int(parent):
        sys.exit(128 + signal.SIGTERM)
