"""Random access to the samples of a tar: its headers are scanned once, then each member is read by offset.

A shard is an open descriptor, wherever it came from (`data/place.py`); names in it are only keys and extensions.
"""

import errno
import os
from collections import OrderedDict
from pathlib import Path

from ditmoe.data.faults import ShardFault
from ditmoe.data.index import DatasetIndex, ShardEntry
from ditmoe.data.tar_scan import scan
from ditmoe.model.errors import UserError


class Shard:
    """One tar, open for reading. Reads are by offset and leave no state, so any order is as good."""

    def __init__(self, descriptor: int, name: str, entry: ShardEntry) -> None:
        """Scan it and take over `descriptor`; `name` is for messages.

        ShardFault, with the descriptor closed, when it is truncated, damaged, or not what the index says.
        """
        self.name = name
        self.file = entry.file
        """Its name in the index."""
        self._descriptor = descriptor
        try:
            contents = scan(descriptor)
            problem = contents.problem
            if problem is None and len(contents.keys) != entry.samples:
                problem = f"holds {len(contents.keys)} samples, and the index says {entry.samples}"
            if problem is not None:
                raise ShardFault(name, problem)
        except OSError as error:
            self.close()
            raise ShardFault(name, f"could not be read: {error.strerror or error}") from error
        except ShardFault:
            self.close()
            raise
        self.keys = contents.keys
        self._members = contents.members

    @classmethod
    def at(cls, path: Path, entry: ShardEntry) -> "Shard":
        """The shard in a local file. ShardFault when it cannot be opened, or as above."""
        return cls(open_file(path, str(path)), str(path), entry)

    @property
    def path(self) -> Path:
        """Its place, as a path."""
        return Path(self.name)

    def extensions(self, member: int) -> list[str]:
        """Extensions of a sample's members."""
        return list(self._members.extensions(member))

    def read(self, member: int, extension: str) -> bytes | None:
        """The bytes of a sample's member; null when it has none. UserError when the file ends early."""
        extent = self._members.find(member, extension)
        if extent is None:
            return None
        try:
            data = os.pread(self._descriptor, extent.size, extent.offset)
            while 0 < len(data) < extent.size:  # a network file system may return less than asked for
                more = os.pread(self._descriptor, extent.size - len(data), extent.offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise UserError(f"{self.where(member)}: could not be read: {error.strerror or error}") from error
        if len(data) < extent.size:
            raise UserError(
                f"{self.where(member)}: truncated tar: {len(data)} of {extent.size} bytes of its .{extension}"
            )
        return data

    def where(self, member: int) -> str:
        """Shard and key, for messages."""
        return f"{self.name}, sample {self.keys[member]}"

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class ShardPool:
    """The shards of a folder, opened when first read; the least recently used one is closed beyond `limit`."""

    def __init__(self, folder: Path, index: DatasetIndex, limit: int) -> None:
        self._folder = folder
        self._index = index
        self._limit = limit
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __getitem__(self, number: int) -> Shard:
        """The shard with this number in the index."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= self._limit:
            self._open.popitem(last=False)[1].close()
        entry = self._index.shards[number]
        self._open[number] = Shard.at(self._folder / entry.file, entry)
        return self._open[number]

    def close(self) -> None:
        """Close all of them."""
        while self._open:
            self._open.popitem()[1].close()


def open_file(path: Path, name: str) -> int:
    """A local shard, opened for reading. ShardFault when it cannot be; UserError at the limit of open files."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise UserError(
                f"{name}: could not be opened: {error.strerror}; lower data.shuffle or raise `ulimit -n`"
            ) from error
        raise ShardFault(name, f"could not be opened: {error.strerror or error}") from error
