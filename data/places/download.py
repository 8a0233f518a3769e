"""Fetching with retries: a broken transfer goes on where it was, and is tried again, though not for ever."""

import hashlib
from collections.abc import Callable
from typing import BinaryIO, Final

from ditmoe.data.places.transports.base import Broken, Refused, Stop, Transport
from ditmoe.data.shards.index import ShardEntry

LONGEST_WAIT: Final = 60.0
"""Seconds between two tries, at most."""
WRONG_TRIES: Final = 2
"""Times that a whole file with other bytes than the index says is fetched, before it is believed to be another."""


class _Wrong(Exception):
    """A whole file came, and it is not the one that the index means."""


class Retries:
    """Counts the tries of a file, and waits between them: 1, 2, 4, … seconds, or longer if the server says so."""

    def __init__(self, retries: int, pause: Callable[[float], None]) -> None:
        self._left = retries
        self._pause = pause
        self._failures = 0

    def wait(self, error: Broken) -> None:
        """Wait before the next try; Refused when there is none."""
        self._failures += 1
        if self._left == 0:
            raise Refused(f"{error} (try {self._failures}, the last)") from error
        self._left -= 1
        self._pause(min(max(2.0 ** (self._failures - 1), error.wait), LONGEST_WAIT))


def fetch_shard(transport: Transport, entry: ShardEntry, file: BinaryIO, retries: Retries, stop: Stop) -> None:
    """Write a whole shard to `file`, with the size and the checksum that the index says.

    Refused when it cannot be had, Ended when `stop` was set, OSError of `file` alone.
    """
    wrong = 0
    transfer = _Transfer(file, entry)
    while True:
        try:
            transfer.run(transport, stop)
            return
        except _Wrong as error:
            wrong += 1
            if wrong == WRONG_TRIES:
                raise Refused(f"{error}, {wrong} times") from error
            transfer.restart()
            retries.wait(Broken(str(error)))
        except Broken as error:
            if error.restart or transfer.size >= entry.bytes:
                transfer.restart()
            retries.wait(error)


class _Transfer:
    """What has come of one shard, over all tries."""

    def __init__(self, file: BinaryIO, entry: ShardEntry) -> None:
        self._file = file
        self._entry = entry
        self.restart()

    def restart(self) -> None:
        """Forget what came."""
        self._file.seek(0)
        self._file.truncate()
        self._digest = hashlib.sha256()
        self._tag: str | None = None
        self.size = 0

    def run(self, transport: Transport, stop: Stop) -> None:
        """Fetch what is missing."""
        expected = self._entry.bytes
        with transport.open(self._entry.file, self.size, self._tag, stop) as reply:
            if reply.start != self.size:
                self.restart()
            self._tag = reply.tag
            if reply.size not in (None, expected):
                raise _Wrong(f"has {reply.size:,} bytes, and the index says {expected:,}")
            for chunk in reply.chunks:
                stop.check()
                self.size += len(chunk)
                if self.size > expected:
                    raise _Wrong(f"has more than the {expected:,} bytes that the index says")
                self._digest.update(chunk)
                self._file.write(chunk)
        stop.check()  # a connection that is shut looks like an end
        if self.size < expected:
            raise Broken(f"broke off after {self.size:,} of {expected:,} bytes")
        found = self._digest.hexdigest()
        if found != self._entry.sha256:
            raise _Wrong(f"checksum mismatch: sha256 {found[:12]}…, and the index says {self._entry.sha256[:12]}…")
        self._file.flush()


def fetch_small(transport: Transport, name: str, limit: int, retries: Retries, stop: Stop) -> bytes:
    """A whole small file. Refused when it cannot be had or is larger than `limit` bytes."""
    while True:
        try:
            return _read_small(transport, name, limit, stop)
        except Broken as error:
            retries.wait(error)


def _read_small(transport: Transport, name: str, limit: int, stop: Stop) -> bytes:
    data = bytearray()
    with transport.open(name, 0, None, stop) as reply:
        for chunk in reply.chunks:
            data += chunk
            if len(data) > limit:
                raise Refused(f"larger than {limit:,} bytes")
    stop.check()
    if reply.size is not None and len(data) != reply.size:
        raise Broken(f"broke off after {len(data):,} of {reply.size:,} bytes")
    return bytes(data)
