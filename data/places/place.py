"""Where a source's files lie: a local folder, a web server, an object store, or what a command writes.

Every place gives a shard as the same thing, an open descriptor of a whole local tar. A remote one is fetched
whole, from front to back, into a temporary file that has no name from the moment it is open: nothing is left
behind, whatever ends the program, and its space is given back when it is closed.
"""

import errno
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from ditmoe.data.places.download import Retries, fetch_shard, fetch_small
from ditmoe.data.places.faults import ShardFault
from ditmoe.data.places.redaction import PIPE
from ditmoe.data.places.transports.base import Refused, Stop, Transport
from ditmoe.data.shards.index import ShardEntry
from ditmoe.data.storage.files import make_folder, open_regular, regular_descriptor
from ditmoe.model.errors import UserError

SMALL_FILE: Final = 2**30
"""Most bytes of a file that is read into memory whole."""
SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)(://|::)")


class Place(Protocol):
    """A folder of shards, wherever it lies."""

    remote: bool
    """Shards have to be fetched, which takes a while."""

    def where(self, name: str) -> str:
        """A file's place for messages: without passwords, and without an address's query."""
        ...

    def read(self, name: str) -> bytes:
        """A small file, such as the index, whole. UserError when it cannot be had or is larger than 1 GiB."""
        ...

    def open(self, entry: ShardEntry, stop: Stop | None = None) -> int:
        """A descriptor of the whole shard, which the caller closes. Its size is the index's; if it is remote, its
        checksum too.

        ShardFault when it cannot be had or is not what the index says; UserError when this machine is at fault
        (no space, too many open files); Ended when `stop` was set.
        """
        ...


class LocalPlace:
    """A folder on this machine, or of a network file system. Its shards are read where they are."""

    remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def where(self, name: str) -> str:
        """The path."""
        return str(self.folder / name)

    def read(self, name: str) -> bytes:
        """As every place."""
        path = self.folder / name
        try:
            with open_regular(path) as file:
                data = file.read(SMALL_FILE + 1)
        except OSError as error:
            raise UserError(f"{path}: could not be read: {error.strerror or error}") from error
        if len(data) > SMALL_FILE:
            raise UserError(f"{path}: larger than {SMALL_FILE:,} bytes")
        return data

    def open(self, entry: ShardEntry, stop: Stop | None = None) -> int:
        """As every place; the size is checked, the checksum is not: that would read all of it."""
        where = self.where(entry.file)
        descriptor = open_file(self.folder / entry.file, where)
        size = os.fstat(descriptor).st_size
        if size == entry.bytes:
            return descriptor
        os.close(descriptor)
        kind = "truncated" if size < entry.bytes else "too long"
        raise ShardFault(where, f"{kind}: {size:,} bytes, and the index says {entry.bytes:,}")


class RemotePlace:
    """A folder that files are fetched from."""

    remote = True

    def __init__(
        self, transport: Transport, retries: int, cache: Path | None, sleep: Callable[[float], None] | None = None
    ) -> None:
        self._transport = transport
        self._retries = retries
        self._cache = cache
        self._sleep = sleep
        if cache is not None:
            make_folder(cache)

    def where(self, name: str) -> str:
        """As every place."""
        return self._transport.where(name)

    def read(self, name: str) -> bytes:
        """As every place."""
        stop = Stop()
        try:
            return fetch_small(self._transport, name, SMALL_FILE, self._new_retries(stop), stop)
        except Refused as error:
            raise UserError(f"{self.where(name)}: {error}") from error

    def open(self, entry: ShardEntry, stop: Stop | None = None) -> int:
        """As every place; it takes as long as fetching takes."""
        stop = stop or Stop()
        try:
            with tempfile.TemporaryFile(dir=self._cache) as file:
                fetch_shard(self._transport, entry, file, self._new_retries(stop), stop)
                return os.dup(file.fileno())
        except Refused as error:
            raise ShardFault(self.where(entry.file), str(error)) from error
        except OSError as error:
            raise UserError(
                f"{self.where(entry.file)}: could not be kept in {self._cache or tempfile.gettempdir()} for "
                f"reading: {error.strerror or error}{_hint(error)}"
            ) from error

    def _new_retries(self, stop: Stop) -> Retries:
        return Retries(self._retries, self._sleep or stop.wait)


def open_place(
    path: str,
    *,
    retries: int,
    timeout: float,
    cache: Path | None,
    sleep: Callable[[float], None] | None = None,
) -> Place:
    """The place that a source's `path` names. Nothing is fetched yet.

    `retries`, `timeout` (seconds) and `cache` are the settings of the same names; `sleep` waits between tries
    instead of the clock. UserError when it names no place.
    """
    # Each way is imported when it is asked for: few runs need them.
    transport: Transport
    if path.startswith(PIPE):
        from ditmoe.data.places.transports.command import Command

        transport = Command(path.removeprefix(PIPE), timeout)
    elif (scheme := SCHEME.match(path)) is None:
        return LocalPlace(Path(path))
    elif scheme[1].lower() in ("http", "https") and scheme[2] == "://":
        from ditmoe.data.places.transports.web import Web

        transport = Web(path, timeout)
    else:
        from ditmoe.data.places.transports.filesystem import FileSystem

        transport = FileSystem(path, timeout)
    return RemotePlace(transport, retries, cache, sleep)


def open_file(path: Path, name: str) -> int:
    """A local shard, opened for reading. ShardFault when it cannot be; UserError at the limit of open files."""
    try:
        return regular_descriptor(path)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise UserError(
                f"{name}: could not be opened: {error.strerror}; lower data.shuffle or raise `ulimit -n`"
            ) from error
        raise ShardFault(name, f"could not be opened: {error.strerror or error}") from error


def _hint(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "; lower data.shuffle or raise `ulimit -n`"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "; name a folder with more space in data.cache, or lower data.shuffle or data.workers"
    return ""
