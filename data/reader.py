"""Random access to the samples of a tar: its headers are scanned once, then each member is read by offset.

Names in an archive are only ever keys and extensions: nothing is extracted and no name becomes a path.

Seam: a shard on another machine is another `Shard` with `keys`, `extensions` and `read`.
"""

import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ditmoe.data.decode import BadSample
from ditmoe.data.faults import ShardFault
from ditmoe.data.index import DatasetIndex, ShardEntry
from ditmoe.data.place import Place
from ditmoe.model.errors import UserError


class Extent(NamedTuple):
    """Where a member's bytes lie in the tar."""

    offset: int
    size: int


class Contents(NamedTuple):
    """What a scan of a tar's headers found."""

    keys: list[str]
    """Key of each sample, in the tar's order."""
    members: list[dict[str, Extent]]
    """Extension → extent, of each sample."""
    problem: str | None
    """Why the scan stopped early or what is wrong with the archive; null: whole."""


def split_name(name: str) -> tuple[str, str]:
    """A member's name as (key, extension): split at the first dot of its last part, as webdataset does.

    What cannot be printed in a name is escaped, because keys come in messages.
    """
    name = name if name.isprintable() else ascii(name)[1:-1]
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def scan(path: Path) -> Contents:
    """List the samples of a tar. Never raises for what is wrong in the archive: that is its `problem`.

    OSError when the file cannot be read at all.
    """
    contents = Contents([], [], None)
    size = path.stat().st_size
    end = 0
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    problem = _add(contents, member, size)
                    if problem:
                        return contents._replace(problem=problem)
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            return contents._replace(problem=f"truncated or damaged tar after {_after(contents)}: {error}")
        # `tarfile` takes a damaged or missing header for the end of the archive; the real end is zeros.
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            return contents._replace(
                problem=f"truncated or damaged tar after {_after(contents)}: no end-of-archive block"
            )
    if not contents.keys:
        return contents._replace(problem="tar without samples")
    if len(set(contents.keys)) != len(contents.keys):
        (twice, _), *_ = Counter(contents.keys).most_common(1)
        return contents._replace(problem=f"the key {twice} comes twice")
    return contents


def _add(contents: Contents, member: tarfile.TarInfo, size: int) -> str | None:
    """Add one member to the last sample or a new one; a problem that ends the scan."""
    if not member.isreg():
        return f"member {member.name!r} is not a regular file"
    if member.offset_data + member.size > size:
        return f"truncated tar: the data of {member.name!r} ends after the file"
    key, extension = split_name(member.name)
    if not contents.keys or contents.keys[-1] != key:
        contents.keys.append(key)
        contents.members.append({})
    if extension in contents.members[-1]:
        return f"member {member.name!r} comes twice"
    contents.members[-1][extension] = Extent(member.offset_data, member.size)
    return None


def _after(contents: Contents) -> str:
    return f"sample {contents.keys[-1]}" if contents.keys else "0 samples"


class Shard:
    """One tar, open for reading. Reads are by offset and leave no state, so any order is as good."""

    def __init__(self, descriptor: int, path: str, entry: ShardEntry) -> None:
        """Scan it; the descriptor becomes its own. ShardFault when it does not hold what the index says."""
        self.path = path
        self.name = entry.file
        self._descriptor = descriptor
        contents = scan(Path(path))
        problem = contents.problem
        if problem is None and len(contents.keys) != entry.samples:
            problem = f"holds {len(contents.keys)} samples, and the index says {entry.samples}"
        if problem is not None:
            self.close()
            raise ShardFault(path, problem)
        self.keys = contents.keys
        self._members = contents.members

    def extensions(self, member: int) -> list[str]:
        """Extensions of a sample's members."""
        return list(self._members[member])

    def read(self, member: int, extension: str) -> bytes | None:
        """The bytes of a sample's member; null when it has none. BadSample when the file ends early."""
        extent = self._members[member].get(extension)
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
        return f"{self.path}, sample {self.keys[member]}"

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def open_shard(folder: Path, entry: ShardEntry) -> Shard:
    """A shard of a local folder. UserError when it cannot be read, or does not hold what the index says."""
    path = folder / entry.file
    try:
        return Shard(os.open(path, os.O_RDONLY), str(path), entry)
    except OSError as error:
        raise UserError(f"{path}: could not be opened: {error.strerror or error}") from error
    except ShardFault as fault:
        raise UserError(str(fault)) from fault


class ShardPool:
    """The shards of a source that its lanes are reading, each opened when first read.

    A shard stays open while some lane expects it. One that stands in for another is open until the next does.
    """

    def __init__(self, place: Place, index: DatasetIndex) -> None:
        self._place = place
        self._index = index
        self._expected: dict[int, tuple[int, ...]] = {}
        self._open: dict[int, Shard] = {}

    def expect(self, lane: int, shards: tuple[int, ...]) -> None:
        """Say which shards a lane reads from now on; those that none reads any more are closed."""
        if self._expected.get(lane) is shards:
            return
        self._expected[lane] = shards
        wanted = {shard for each in self._expected.values() for shard in each}
        for number in [number for number in self._open if number not in wanted]:
            self._open.pop(number).close()

    def __getitem__(self, number: int) -> Shard:
        """The shard with this number in the index. ShardFault when it cannot be read."""
        if number not in self._open:
            entry = self._index.shards[number]
            self._open[number] = Shard(self._place.open(entry), self._place.where(entry.file), entry)
        return self._open[number]

    def close(self) -> None:
        """Close all of them."""
        while self._open:
            self._open.popitem()[1].close()
