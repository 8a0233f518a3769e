"""Random access to the samples of a tar: its headers are scanned once, then each member is read by offset.

A shard is an open descriptor, wherever it came from (`place.py`); names in it are only keys and extensions.
"""

import os
import weakref
from functools import partial
from pathlib import Path
from typing import Final

from ditmoe.data.places.faults import ShardFault
from ditmoe.data.places.fetcher import ShardFetcher
from ditmoe.data.places.place import Place, open_file
from ditmoe.data.shards.decode import BadSample
from ditmoe.data.shards.index import DatasetIndex, ShardEntry
from ditmoe.data.shards.sample import RawSample
from ditmoe.data.shards.tar_scan import scan
from ditmoe.model.outside.text import counted

FETCHED_AHEAD: Final = 4
"""Remote shards that are held before they are read."""


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
        # Also where the shard is given up unclosed, as by an iteration that somebody leaves.
        self._closed = weakref.finalize(self, os.close, descriptor)
        self._closed.atexit = False
        try:
            contents = scan(descriptor)
            problem = contents.problem
            if problem is None and len(contents.keys) != entry.samples:
                problem = f"holds {counted(len(contents.keys), 'sample')}, and the index says {entry.samples}"
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

    def extensions(self, member: int) -> list[str]:
        """Extensions of a sample's members."""
        return list(self._members.extensions(member))

    def sample(self, member: int) -> RawSample:
        """A sample, to be decoded."""
        return RawSample(self._members.extensions(member), partial(self.read, member))

    def read(self, member: int, extension: str) -> bytes | None:
        """The bytes of a sample's member; null when it has none. BadSample when the file ends early."""
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
            raise BadSample(f"could not be read: {error.strerror or error}") from error
        if len(data) < extent.size:
            raise BadSample(f"truncated tar: {len(data)} of {extent.size} bytes of its .{extension}")
        return data

    def where(self, member: int) -> str:
        """Shard and key, for messages."""
        return f"{self.name}, sample {self.keys[member]}"

    def close(self) -> None:
        """Close the file."""
        self._closed()


class ShardPool:
    """The shards of a source that its lanes are reading, each opened when first read; remote ones fetched ahead.

    A shard stays open while some lane expects it. One that stands in for another is open until the next window.
    """

    def __init__(self, place: Place, index: DatasetIndex) -> None:
        self._place = place
        self._index = index
        self._fetcher = ShardFetcher(place, index.shards, ahead=FETCHED_AHEAD)
        self._expected: dict[int, tuple[int, ...]] = {}
        self._open: dict[int, Shard] = {}
        self._damaged: dict[int, ShardFault] = {}

    def expect(self, lane: int, shards: tuple[int, ...]) -> None:
        """Say which shards a lane reads now and next; those that none reads any more are closed."""
        if self._expected.get(lane) is shards:
            return
        before = self._expected.get(lane, ())
        self._expected[lane] = shards
        wanted = {shard for each in self._expected.values() for shard in each}
        for number in {*self._open, *self._damaged, *before} - wanted:
            self._let_go(number)
        for number in shards:
            if number not in self._open:
                self._fetcher.prefetch(number)

    def __getitem__(self, number: int) -> Shard:
        """The shard with this number in the index. ShardFault when it cannot be read."""
        if number in self._damaged:
            raise ShardFault(self._damaged[number].shard, self._damaged[number].reason)
        if number not in self._open:
            entry = self._index.shards[number]
            descriptor = self._fetcher.get(number)
            try:
                self._open[number] = Shard(descriptor, self._place.where(entry.file), entry)
            except ShardFault as fault:
                self._damaged[number] = fault  # a thousand samples need not find out one by one
                raise
        return self._open[number]

    def _let_go(self, number: int) -> None:
        """Close a shard, or forget what was fetched or known of it."""
        self._damaged.pop(number, None)
        if number in self._open:
            self._open.pop(number).close()
        else:
            self._fetcher.drop(number)

    def close(self) -> None:
        """Close all of them, and end fetching."""
        self._fetcher.close()
        while self._open:
            self._open.popitem()[1].close()
