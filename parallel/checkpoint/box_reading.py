"""What is wanted of a file of boxes, read either alone or together with all the rest, for the file's checksum.

Whoever reads a file from its beginning to its end reads each byte once: what is wanted goes to its place on the
way. That memory is filled before the checksum is known.
"""

import hashlib
from collections.abc import Sequence
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

    def part(self, place: Place) -> Tensor:
        """The memory of a part of the box, by its place in the parameter."""
        row, column, rows, columns = place
        top, left = row - self.box.row, column - self.box.column
        return self.tensor.detach()[top : top + rows, left : left + columns]


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
    """Read what is wanted of a file, and no more.

    Args:
        reads: in the order of the file.

    Raises:
        EOFError: the file ends before.
        OSError: it cannot be read.
    """
    with file.open("rb", buffering=0) as stream:
        for read in reads:
            row, column, rows, columns = read.place
            part = (row - read.stored[0], column - read.stored[1], rows, columns)
            read_box(stream, read.begin, read.stored[3], part, targets[read.piece].part(read.place))


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
        target = targets[reads[0].piece].part(reads[0].place)
        if _in_place(target):
            hashed.into(_bytes_of(target))
            return
    step = max(1, AT_ONCE // (BYTES * columns))
    buffer = np.empty((min(step, rows), columns), np.float32)
    for first in range(0, rows, step):
        found = buffer[: min(step, rows - first)]
        hashed.into(found.data.cast("B"))
        for read in reads:
            top, left, high, wide = read.place
            begin, end = max(top, row + first), min(top + high, row + first + len(found))
            if begin < end:
                part = found[begin - row - first : end - row - first, left - column : left - column + wide]
                target = targets[read.piece].part((begin, left, end - begin, wide))
                target.copy_(torch.from_numpy(part))


def _in_place(target: Tensor) -> bool:
    """Whether a file's bytes are those of the memory."""
    return target.dtype == torch.float32 and target.device.type == "cpu" and target.is_contiguous()


def _bytes_of(target: Tensor) -> memoryview:
    content: memoryview = target.view(-1).numpy().data
    return content.cast("B")


def read_box(stream: BinaryIO, begin: int, columns: int, part: Place, target: Tensor) -> None:
    """Read a part of a stored box.

    Args:
        begin: where the box begins in the file.
        columns: of the box.
        part: row, column, rows and columns of it that are wanted.
        target: `[rows, columns]`, of any type and on any device.

    Raises:
        EOFError: the file ends before.
    """
    row, column, rows, width = part
    if _in_place(target) and (width == columns or rows == 1):
        stream.seek(begin + BYTES * (row * columns + column))
        fill(stream, _bytes_of(target))
        return
    step = max(1, AT_ONCE // (BYTES * columns))
    buffer = np.empty(min(step, rows) * columns, np.float32)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        # From the first element that is wanted to the last; of a box that is wanted whole these are all wanted.
        elements = (count - 1) * columns + width
        stream.seek(begin + BYTES * ((row + first) * columns + column))
        fill(stream, buffer[:elements].data.cast("B"))
        found = torch.from_numpy(buffer[: count * columns]).view(count, columns)[:, :width]
        target[first : first + count].copy_(found)


def fill(stream: Any, memory: memoryview) -> None:
    """Read as many bytes as the memory has. EOFError: there are fewer."""
    done = 0
    while done < len(memory):
        count = stream.readinto(memory[done:])
        if not count:
            raise EOFError
        done += count
