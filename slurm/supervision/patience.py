"""Calls that may hang, from a program that must not: a shared folder that does not answer holds up its readers."""

import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Generic, TypeVar

from ditmoe.model.outside.text import message_lines

T = TypeVar("T")
FOLDER_SECONDS: Final = 120.0
"""How long the shared folder may take to answer at the start and the end of an attempt."""
_FINISH_SECONDS: Final = 5.0


class _Call(Generic[T]):
    """A call in a thread that nobody has to wait for."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._value: T | None = None
        self._error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # raised by who asked
            self._error = error
        self._done.set()

    def answered(self, seconds: float) -> bool:
        return self._done.wait(seconds)

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


class Shared:
    """Asks a shared folder, one call after the other, each in a thread of its own."""

    def __init__(self) -> None:
        self._hanging: _Call[object] | None = None

    def ask(self, call: Callable[[], T], seconds: float) -> T:
        """What a call returns or raises.

        Raises:
            TimeoutError: it has not returned in time, or one before it still hangs; then it was not begun.
        """
        begin = time.monotonic()
        if self._hanging is not None:
            if not self._hanging.answered(seconds):
                raise TimeoutError(f"no answer within {seconds:g} s")
            self._hanging = None
        running = _Call(call)
        if not running.answered(max(0.0, seconds - (time.monotonic() - begin))):
            self._hanging = running  # type: ignore[assignment]
            raise TimeoutError(f"no answer within {seconds:g} s")
        return running.result()


class Teller:
    """Prints lines from a thread: the output is a file, of a folder that may hang."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._print, daemon=True)
        self._thread.start()

    def __call__(self, message: str) -> None:
        """Say something, with the time."""
        self._lines.put(f"[{time.strftime('%F %T')}] ditmoe: {message_lines(message)}\n")

    def pass_on(self, line: str) -> None:
        """Print a line as it is."""
        self._lines.put(line)

    def finish(self) -> None:
        """Wait a moment for what is not yet printed."""
        self._lines.put(None)
        self._thread.join(_FINISH_SECONDS)

    def _print(self) -> None:
        while (line := self._lines.get()) is not None:
            with suppress(OSError, ValueError):  # the output is gone; the record of attempts has what matters
                sys.stderr.write(line)
                sys.stderr.flush()
