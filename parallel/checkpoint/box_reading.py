"""What is wanted of a file of boxes, read either alone or together with all the rest, for the file's checksum.

Whoever reads a file from its beginning to its end reads each byte once: what is wanted goes to its place on the
way. That memory is filled before the checksum is known.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ditmoe.parallel.boxes import Box

BYTES: Final = 4
"""Of an element: a checkpoint holds float32 only."""
AT_ONCE: Final = 4 * 2**20
"""Bytes that are read before they are put where they belong."""

Place = tuple[int, int, int, int]
"""Row, column, rows and columns in a parameter."""


class Target(NamedTuple):
    """Memory to be filled."""

    box: Box
    tensor: Tensor
    """`[box.rows, box.columns]`, of any type and on any device."""
    scale: float = 1.0
    """What is read is multiplied by it."""

    def part(self, place: Place) -> Tensor:
        """The memory of a part of the box, by its place in the parameter."""
        row, column, rows, columns = place
        top, left = row - self.box.row, column - self.box.column
        return self.tensor.detach()[top : top + rows, left : left + columns]

    def takes(self, place: Place) -> memoryview | None:
        """The memory of a part of the box, where a file's bytes can go as they are."""
        part = self.part(place)
        fits = part.dtype == torch.float32 and part.device.type == "cpu" and part.is_contiguous()
        if not fits or self.scale != 1:
            return None
        content: memoryview = part.view(-1).numpy().data
        return content.cast("B")

    def put(self, place: Place, found_RC: Tensor) -> None:
        """Fill a part of the box with what a file holds of it."""
        self.part(place).copy_(found_RC if self.scale == 1 else found_RC * self.scale)


class Read(NamedTuple):
    """A part of a stored box that goes to a target."""

    file: int
    begin: int
    """Where the stored box begins in the file."""
    stored: Place
    """Of the stored box."""
    piece: int
    """Number of the target."""
    place: Place
    """Of the part."""


def read_boxes(file: Path, reads: Sequence[Read], targets: Sequence[Target]) -> None:
    """Read what is wanted of a file, and no more; what several targets want, once.

    Args:
        reads: in the order of the file.

    Raises:
        EOFError: the file ends before.
        OSError: it cannot be read.
    """
    with file.open("rb", buffering=0) as stream:
        for _, of_box in groupby(reads, key=lambda read: read.begin):
            for together in _overlapping(of_box):
                _read_box(stream, together, targets)


def _overlapping(reads: Iterable[Read]) -> Iterator[list[Read]]:
    """Reads of one stored box, those together that want some of the same stretch of the file."""
    together: list[Read] = []
    end = 0
    for read in sorted(reads, key=lambda read: read.place[:2]):
        row, column, rows, columns = read.place
        width = read.stored[3]
        if together and row * width + column >= end:
            yield together
            together = []
        end = max(end, (row + rows - 1) * width + column + columns)
        together.append(read)
    yield together


def read_whole(file: Path, head: bytes, reads: Sequence[Read], targets: Sequence[Target]) -> tuple[int, str]:
    """Read a file to its end, and on the way what is wanted of it.

    Args:
        head: the file's first bytes, which were read before.
        reads: in the order of the file.

    Returns:
        The file's bytes and its SHA-256.

    Raises:
        EOFError: the file ends before what is wanted; then all of it was read.
        OSError: it cannot be read.
    """
    with file.open("rb", buffering=0) as stream:
        stream.seek(len(head))
        hashed = _Hashed(stream, head)
        for begin, of_box in groupby(reads, key=lambda read: read.begin):
            hashed.pass_to(begin)
            _put(hashed, list(of_box), targets)
        hashed.pass_to(None)
        return hashed.at, hashed.digest.hexdigest()


class _Hashed:
    """The rest of a file, of which no byte is left out."""

    def __init__(self, stream: Any, head: bytes) -> None:
        self._stream = stream
        self._buffer = memoryview(bytearray(AT_ONCE))
        self.digest = hashlib.sha256(head)
        self.at = len(head)
        """Bytes that were read."""

    def into(self, memory: memoryview) -> None:
        """Read so many bytes. EOFError: there are fewer."""
        fill(self._stream, memory)
        self.digest.update(memory)
        self.at += len(memory)

    def pass_to(self, place: int | None) -> None:
        """Read what is before a place, or all that is left. EOFError: the file ends before."""
        while place is None or self.at < place:
            count = AT_ONCE if place is None else min(AT_ONCE, place - self.at)
            found = self._stream.readinto(self._buffer[:count])
            if not found:
                if place is None:
                    return
                raise EOFError
            self.digest.update(self._buffer[:found])
            self.at += found


def _put(hashed: _Hashed, reads: list[Read], targets: Sequence[Target]) -> None:
    """Read a stored box, and put its parts where they are wanted."""
    row, column, rows, columns = reads[0].stored
    if len(reads) == 1 and reads[0].place == reads[0].stored:
        memory = targets[reads[0].piece].takes(reads[0].place)
        if memory is not None:
            hashed.into(memory)
            return
    step = max(1, AT_ONCE // (BYTES * columns))
    buffer = np.empty((min(step, rows), columns), np.float32)
    for first in range(0, rows, step):
        found = buffer[: min(step, rows - first)]
        hashed.into(found.data.cast("B"))
        _deal(torch.from_numpy(found), row + first, column, reads, targets)


def _deal(found_RC: Tensor, row: int, column: int, reads: list[Read], targets: Sequence[Target]) -> None:
    """Put parts of what was read where they are wanted.

    Args:
        row: with the column, where in the parameter what was read begins; it has all columns that are wanted.
    """
    for read in reads:
        top, left, high, wide = read.place
        begin, end = max(top, row), min(top + high, row + len(found_RC))
        if begin < end:
            part = found_RC[begin - row : end - row, left - column : left - column + wide]
            targets[read.piece].put((begin, left, end - begin, wide), part)


def _read_box(stream: BinaryIO, reads: list[Read], targets: Sequence[Target]) -> None:
    """Read of a stored box what is wanted by some targets that overlap. EOFError: the file ends before."""
    begin, (first_row, first_column, _, columns) = reads[0].begin, reads[0].stored
    top, left = (min(read.place[axis] for read in reads) for axis in (0, 1))
    bottom, right = (max(read.place[axis] + read.place[axis + 2] for read in reads) for axis in (0, 1))
    rows, width = bottom - top, right - left

    def seek(row: int) -> None:
        stream.seek(begin + BYTES * ((row - first_row) * columns + left - first_column))

    if len(reads) == 1 and (width == columns or rows == 1):
        memory = targets[reads[0].piece].takes(reads[0].place)
        if memory is not None:
            seek(top)
            fill(stream, memory)
            return
    step = max(1, AT_ONCE // (BYTES * columns))
    buffer = np.empty(min(step, rows) * columns, np.float32)
    for row in range(top, bottom, step):
        count = min(step, bottom - row)
        # From the first element that is wanted to the last; of a box that is wanted whole these are all wanted.
        elements = (count - 1) * columns + width
        seek(row)
        fill(stream, buffer[:elements].data.cast("B"))
        found_RC = torch.from_numpy(buffer[: count * columns]).view(count, columns)[:, :width]
        _deal(found_RC, row, left, reads, targets)


def fill(stream: Any, memory: memoryview) -> None:
    """Read as many bytes as the memory has. EOFError: there are fewer."""
    done = 0
    while done < len(memory):
        count = stream.readinto(memory[done:])
        if not count:
            raise EOFError
        done += count
