"""What all ways of fetching a file have in common: a reply of bytes, three ways to fail, being asked to end."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, NamedTuple, Protocol

CHUNK: Final = 2**18
"""Most bytes that come at a time."""


class Broken(Exception):
    """A transfer did not begin or ended early, and may do better the next time."""

    def __init__(self, reason: str, wait: float = 0.0, restart: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        """Seconds that the other side asked to wait."""
        self.restart = restart
        """What came so far is of no use."""


class Refused(Exception):
    """The file cannot be had, and trying again would not help."""


class Ended(Exception):
    """The transfer was asked to end."""


class Reply(NamedTuple):
    """A file on its way."""

    start: int
    """Where in the file the first byte lies: as asked for, or 0."""
    tag: str | None
    """What tells this version of the file from others, to go on with it later; null: unknown."""
    size: int | None
    """Bytes of the whole file; null: unknown."""
    chunks: Iterator[bytes]
    """The bytes, none of them empty. It raises Broken, Refused or Ended."""


class Stop:
    """Asks a fetch in another thread to end, also while it waits for bytes."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._end: Callable[[], None] | None = None

    def set(self) -> None:
        """Ask."""
        with self._lock:
            self._event.set()
            if self._end is not None:
                self._end()

    def is_set(self) -> bool:
        """Was it asked?"""
        return self._event.is_set()

    def check(self) -> None:
        """Ended when it was asked."""
        if self._event.is_set():
            raise Ended

    def wait(self, seconds: float) -> None:
        """Pause; Ended as soon as it is asked."""
        self._event.wait(seconds)
        self.check()

    @contextmanager
    def calling(self, end: Callable[[], None]) -> Iterator[None]:
        """While the block runs, asking calls `end`, in the thread that asks. Ended when it was asked before."""
        with self._lock:
            self.check()
            self._end = end
        try:
            yield
        finally:
            with self._lock:
                self._end = None


class Transport(Protocol):
    """One place that files come from."""

    def where(self, name: str) -> str:
        """The file's place, for messages: without secrets."""

    def open(self, name: str, start: int, tag: str | None, stop: Stop) -> AbstractContextManager[Reply]:
        """Ask for a file from byte `start` on, if its version is still `tag`. Broken, Refused or Ended."""
