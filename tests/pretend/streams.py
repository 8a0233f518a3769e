"""Streams and events of a pretended GPU: they know what work the host, and each other, have waited for.

Work is done at once in truth. A clock says for each stream how much of its work is known to be done: a stream's
own by itself, another's once it has waited for an event, the host's once it has waited for either. So a value that
the host reads before it has waited for the copy is found, though it is there.
"""

import threading
from collections.abc import Callable
from typing import Any, ClassVar, Final, Self
from weakref import WeakSet

Clock = dict["Stream", int]
"""Stream → pieces of its work that are known to be done."""


def _merge(into: Clock, other: Clock) -> None:
    for stream, work in other.items():
        into[stream] = max(into.get(stream, 0), work)


class Stream:
    """As `torch.cuda.Stream`."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.known: Clock = {}
        """What is done before this stream's next work."""
        self.device, self.priority, self.cuda_stream = device, priority, id(self)
        _STREAMS.add(self)

    def issue(self) -> tuple["Stream", int]:
        """Give it a piece of work; its name."""
        self.known[self] = self.known.get(self, 0) + 1
        return self, self.known[self]

    def wait_stream(self, other: "Stream") -> None:
        """Later work here comes after what the other has now."""
        _merge(self.known, other.known)

    def wait_event(self, event: "Event") -> None:
        """Later work here comes after what was before the event."""
        _merge(self.known, event.known)

    def record_event(self, event: "Event | None" = None) -> "Event":
        """An event after what is here now."""
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Whether its work is done; it is."""
        return True

    def synchronize(self) -> None:
        """The host waits for all of it."""
        HOST.wait(self.known, "Stream.synchronize")


class Event:
    """As `torch.cuda.Event`; to wait for one is what a program does on purpose, and no fault."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.known: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        """After what the stream has now."""
        self.known = dict((stream or HOST.current).known)

    def wait(self, stream: Stream | None = None) -> None:
        """The stream waits."""
        (stream or HOST.current).wait_event(self)

    def synchronize(self) -> None:
        """The host waits."""
        HOST.learn(self.known)

    def query(self) -> bool:
        """Whether what was before it is done; it is."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds; nothing takes time here."""
        return 0.0


class Host(threading.local):
    """What a thread of the host knows to be done, and the stream that it gives work to."""

    told: ClassVar[Callable[[str], None]] = staticmethod(lambda operation: None)
    """Called where the host waits for more than an event."""

    def __init__(self) -> None:
        self.default = self.current = _DEFAULT
        self.known: Clock = {}

    def learn(self, known: Clock) -> None:
        """Know so much to be done."""
        _merge(self.known, known)

    def wait(self, known: Clock, operation: str) -> None:
        """Know so much to be done, and say that the host waited."""
        self.learn(known)
        Host.told(operation)

    def synchronize(self, device: Any = None) -> None:
        """As `torch.cuda.synchronize`."""
        for stream in list(_STREAMS):
            _merge(self.known, stream.known)
        Host.told("torch.cuda.synchronize")

    def knows(self, work: tuple[Stream, int]) -> bool:
        """Whether the host has waited for a piece of work."""
        stream, number = work
        return self.known.get(stream, 0) >= number


_STREAMS: Final[WeakSet[Stream]] = WeakSet()
_DEFAULT: Final = Stream()
HOST: Final = Host()


class On:
    """As `torch.cuda.stream`: work goes to this stream."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> Self:
        self._before = HOST.current
        if self._stream is not None:
            HOST.current = self._stream
        return self

    def __exit__(self, *_: object) -> None:
        HOST.current = self._before
