"""Reading the files of a checkpoint once: the checksum of each is taken while what is wanted of it is read.

Several processes may read a checkpoint together. Each file is one process's: that one reads the header, tells the
others, and reads all the rest from the beginning to the end; what it wants of the file itself it takes on the way.
What it wants of the others' files it reads from there, and no more. Files are dealt so that the ranks of the
layout that wrote a checkpoint have their own again, of which they want everything.

So memory is filled before its file is known to be intact. Where a problem is told, nothing in it may be used.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from ditmoe.model.errors import UserError
from ditmoe.model.weights.untrusted import leads_out, regular_file_bytes
from ditmoe.parallel.checkpoint.box_reading import Read, read_whole
from ditmoe.parallel.checkpoint.box_storage import Piece, StoredBoxes, read_part, shard_files, targets
from ditmoe.parallel.checkpoint.box_table import BoxTable, FileBoxes
from ditmoe.parallel.checkpoint.marker import MARKER
from ditmoe.parallel.checkpoint.shard_files import read_head

FileFacts = Mapping[str, Any]
"""Of a file, as the marker lists them: `bytes` and `sha256`."""


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Readers:
    """The processes that read a checkpoint together, and which of them this is."""

    rank: int = 0
    ranks: int = 1
    gather: Callable[[Any], list[Any]] = _alone
    """Every reader's value, in their order, on each of them; a collective call."""


ALONE: Final = Readers()


@dataclass
class CheckedFiles:
    """Files of a checkpoint that are read together; all readers call each method."""

    path: Path
    """Of the checkpoint."""
    files: Mapping[str, FileFacts]
    """Name, with the part that it is of, → what the marker says of it."""
    readers: Readers = ALONE
    stored: dict[str, StoredBoxes] = field(default_factory=dict)
    """Part → what its headers say, once they were looked at."""
    _heads: dict[str, bytes] = field(default_factory=dict)

    @property
    def own(self) -> list[str]:
        """The files that this reader is to check: those of one number are one reader's, side by side."""
        shards = sorted({name.partition("/")[2] for name in self.files})
        reader_of = {shard: place * self.readers.ranks // len(shards) for place, shard in enumerate(shards)}
        mine = (name for name in self.files if reader_of[name.partition("/")[2]] == self.readers.rank)
        return sorted(mine, key=lambda name: (name.partition("/")[2], name))

    def look(self) -> list[str]:
        """Look for all files, and read their headers.

        Returns:
            The problems, which all readers get.
        """
        problems = self._not_listed() if self.readers.rank == 0 else []
        boxes: dict[str, FileBoxes] = {}
        for name in self.own:
            try:
                if (problem := _not_as_listed(self.path, name, self.files[name])) is not None:
                    raise UserError(problem)
                self._heads[name], boxes[name] = read_head(self.path / name)
            except UserError as error:
                problems.append(str(error))
        gathered = self.readers.gather((problems, boxes))
        problems = [problem for found, _ in gathered for problem in found]
        if problems:
            return self.damaged() or problems
        self.stored = _together(self.path, {name: of for _, found in gathered for name, of in found.items()})
        return []

    def damaged(self) -> list[str]:
        """Read all files for their checksums alone; the problems, which all readers get."""
        found = [damage(self.path, name, self.files[name]) for name in self.own]
        gathered = self.readers.gather([problem for problem in found if problem is not None])
        return [problem for problems in gathered for problem in problems]

    def fill(self, wanted: Mapping[str, Sequence[Piece]]) -> list[str]:
        """Fill the memory of every piece, and check every file.

        Args:
            wanted: part → pieces; parts with the same boxes have the same pieces, but for their memory.

        Returns:
            The damage, which all readers get. Where there is any, what was filled is worth nothing.

        Raises:
            UserError: on all readers, where no file is damaged: a piece is not there, or a file cannot be read.
        """
        problem, reads = None, {}
        try:
            reads = self._planned(wanted)
        except UserError as error:
            problem = str(error)
        damages = []
        for name in self.own:
            pieces = wanted.get(name.partition("/")[0], ())
            found = damage(
                self.path, name, self.files[name], self._heads.pop(name, b""), reads.pop(name, ()), pieces
            )
            damages += [] if found is None else [found]
        try:
            for name, of_file in reads.items():
                read_part(self.path / name, of_file, wanted[name.partition("/")[0]])
        except UserError as error:
            problem = str(error)
        gathered = self.readers.gather((damages, problem))
        damages = [found for damages_of, _ in gathered for found in damages_of]
        problems = [found for _, found in gathered if found is not None]
        if problems and not damages:
            raise UserError(problems[0])
        return damages

    def _planned(self, wanted: Mapping[str, Sequence[Piece]]) -> dict[str, list[Read]]:
        """File → what is wanted of it."""
        plans: dict[int, list[Read]] = {}
        reads = {}
        for part, pieces in wanted.items():
            stored = self.stored[part]
            if id(stored.table) not in plans:
                plans[id(stored.table)] = stored.plan(pieces)
            for number, of_file in groupby(plans[id(stored.table)], key=lambda read: read.file):
                reads[f"{part}/{stored.files[number]}"] = list(of_file)
        return reads

    def _not_listed(self) -> list[str]:
        """What lies beside the files and is none of them."""
        parts = dict.fromkeys(name.partition("/")[0] for name in self.files)
        try:
            return [
                f"{self.path / part / file}: is not in the list of {MARKER}"
                for part in parts
                for file in shard_files(self.path / part)
                if f"{part}/{file}" not in self.files
            ]
        except UserError as error:
            return [str(error)]


def _together(path: Path, boxes: Mapping[str, FileBoxes]) -> dict[str, StoredBoxes]:
    """The parts, of which most often all have the same boxes: then these are put together once."""
    tables: dict[tuple[int, ...], BoxTable] = {}
    stored = {}
    for part in dict.fromkeys(name.partition("/")[0] for name in boxes):
        names = sorted(name for name in boxes if name.startswith(f"{part}/"))
        of_part = [boxes[name] for name in names]
        key = tuple(map(id, of_part))
        if key not in tables:
            tables[key] = BoxTable(of_part)
        stored[part] = StoredBoxes(path / part, tuple(name.partition("/")[2] for name in names), tables[key])
    return stored


def damage(
    path: Path,
    name: str,
    facts: FileFacts,
    head: bytes = b"",
    reads: Iterable[Read] = (),
    pieces: Sequence[Piece] = (),
) -> str | None:
    """Read a file of a checkpoint to its end, and on the way what is wanted of it.

    Args:
        head: its first bytes, which were read before.
        reads: in the order of the file.
        pieces: that they go to.

    Returns:
        What is wrong with it: missing, another size, another checksum. Then the pieces are worth nothing.
    """
    file = path / name
    problem = _not_as_listed(path, name, facts)
    if problem is not None:
        return problem
    try:
        size, sha256 = read_whole(file, head, list(reads), targets(pieces))
    except EOFError:
        return f"{file}: ends before what its header tells of; has it changed?"
    except OSError as error:
        return f"{file}: cannot be read ({error.strerror or error})"
    if size != facts["bytes"]:
        return f"{file}: {size} bytes found, expected {facts['bytes']}"
    if sha256 != facts["sha256"]:
        return f"{file}: its contents have changed (checksum differs from the one in {MARKER})"
    return None


def _not_as_listed(path: Path, name: str, facts: FileFacts) -> str | None:
    """What can be seen to be wrong with a file before it is read."""
    file = path / name
    try:
        if leads_out(file, path):
            return f"{file}: is a link that leads out of the checkpoint; expected a file of it"
        size = regular_file_bytes(file)
    except UserError as error:
        return str(error)
    except FileNotFoundError:
        return f"{file}: missing; expected {facts['bytes']} bytes"
    except OSError as error:
        return f"{file}: cannot be read ({error.strerror or error})"
    if size != facts["bytes"]:
        return f"{file}: {size} bytes found, expected {facts['bytes']}"
    return None
