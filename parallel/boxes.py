"""Boxes: which part of a canonical parameter a piece of memory stands for.

A checkpoint sees every parameter as a matrix: the first dim is its rows, all others together are its columns (a
vector of n elements is `[n, 1]`). A tensor-parallel rank holds some boxes of it, stacked, as a matrix of its own;
ZeRO cuts that one once more, flattened, into runs. A run is again a few boxes, each of them contiguous in memory.

    canonical [6, 4], rows dealt to 2 tensor ranks      rank 1 holds        its run 5:12, flattened
        ....                                            [3, 4], which is    is three boxes of the canonical matrix
        ....                                            one box             (row, column, rows, columns):
        ....                                              0000
        0000                                              0111                (4, 1, 1, 3)
        0111                                              1111                (5, 0, 1, 4)
        1111
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, order=True)
class Box:
    """A rectangle of a matrix."""

    row: int
    column: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Its elements."""
        return self.rows * self.columns

    @property
    def slices(self) -> tuple[slice, slice]:
        """Its place as the index of an array."""
        return slice(self.row, self.row + self.rows), slice(self.column, self.column + self.columns)

    def overlap(self, other: "Box") -> "Box | None":
        """What both have; None: nothing."""
        row, column = max(self.row, other.row), max(self.column, other.column)
        rows = min(self.row + self.rows, other.row + other.rows) - row
        columns = min(self.column + self.columns, other.column + other.columns) - column
        return Box(row, column, rows, columns) if rows > 0 and columns > 0 else None

    def within(self, other: "Box") -> "Box":
        """The same place, counted from the beginning of another box."""
        return Box(self.row - other.row, self.column - other.column, self.rows, self.columns)


Placement = tuple[Box, ...]
"""Where a rank's own tensor lies in the canonical matrix: boxes of one width, stacked in its order of rows."""


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter of at least one dim."""
    return shape[0], math.prod(shape[1:])


def whole(shape: Sequence[int]) -> Placement:
    """All of a parameter."""
    rows, columns = matrix_shape(shape)
    return (Box(0, 0, rows, columns),)


def row_slices(shape: Sequence[int], rank: int, ranks: int, parts: int = 1) -> Placement:
    """What rank `rank` of `ranks` holds when each of `parts` equal stretches of rows is dealt out evenly.

    Column-parallel weights and their biases (one part), and the queries, keys and values of attention, which are
    three parts of one parameter.

    Args:
        shape: of the whole canonical parameter.
    """
    rows, columns = matrix_shape(shape)
    held, left_over = divmod(rows, parts * ranks)
    assert not left_over, f"{rows} rows are not dealt evenly in {parts} parts to {ranks} ranks"
    return tuple(Box(part * rows // parts + rank * held, 0, held, columns) for part in range(parts))


def column_slice(shape: Sequence[int], rank: int, ranks: int) -> Placement:
    """What rank `rank` of `ranks` holds when the columns are dealt out evenly: row-parallel weights.

    Args:
        shape: of the whole canonical parameter.
    """
    rows, columns = matrix_shape(shape)
    assert columns % ranks == 0, f"{columns} columns are not dealt evenly to {ranks} ranks"
    held = columns // ranks
    return (Box(0, rank * held, rows, held),)


def boxes_of_run(placement: Placement, start: int, length: int) -> Iterator[tuple[int, Box]]:
    """The boxes of the canonical matrix that a run of a rank's flattened tensor is, at most three per slab.

    Args:
        placement: of the rank's whole tensor.
        start: where the run begins in it, flattened.
        length: elements of the run.

    Yields:
        where the box begins within the run, and the box; they follow each other without a gap.
    """
    base = 0
    for slab in placement:
        at, end = max(start, base) - base, min(start + length, base + slab.size) - base
        while at < end:
            row, column = divmod(at, slab.columns)
            if column or end - at < slab.columns:
                box = Box(slab.row + row, slab.column + column, 1, min(slab.columns - column, end - at))
            else:
                box = Box(slab.row + row, slab.column, (end - at) // slab.columns, slab.columns)
            yield base + at - start, box
            at += box.size
        base += slab.size
    assert start >= 0 and start + length <= base, "a run reaches beyond its tensor"


def tiling_problems(name: str, boxes: Sequence[Box], shape: Sequence[int]) -> Iterator[str]:
    """Where boxes do not hold each element of a parameter exactly once, one message each.

    Sweeps over the rows: between two rows where any box begins or ends, the boxes there must follow each other
    from the first column to the last.
    """
    rows, columns = matrix_shape(shape)
    if not boxes:
        yield f"{name} is not in it"
        return
    starting: dict[int, list[Box]] = {}
    for box in boxes:
        starting.setdefault(box.row, []).append(box)
    cuts = sorted({0, rows} | {cut for box in boxes for cut in (box.row, box.row + box.rows)})
    present: list[Box] = []
    for first, following in pairwise(cuts):
        present = [box for box in present if box.row + box.rows > first] + starting.get(first, [])
        band = f"rows {first} to {following - 1}"
        expected = columns if 0 <= first < rows else 0
        end = 0
        for box in sorted(present, key=lambda box: box.column):
            if box.column > end:
                yield f"{band}, columns {end} to {box.column - 1} of {name} are nowhere in it"
            elif box.column < end:
                last = min(end, box.column + box.columns) - 1
                yield f"{band}, columns {box.column} to {last} of {name} are twice in it"
            end = max(end, box.column + box.columns)
        if end < expected:
            yield f"{band}, columns {end} to {expected - 1} of {name} are nowhere in it"
        elif end > expected:
            yield f"{band}, columns {expected} to {end - 1} of {name} are beyond its {rows} × {columns}"
