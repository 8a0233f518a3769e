"""Many boxes of many parameters as columns of numbers: that they tile the parameters, and which of them overlap.

A checkpoint of 1,024 ranks has two million boxes. So nothing here goes from box to box in Python; only where
something is wrong, `tiling_problems` looks closer, to say what.

T boxes; W wanted boxes; a place is (row, column, rows, columns).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditmoe.parallel.boxes import Box, matrix_shape

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class FileBoxes:
    """The boxes of one file."""

    names: tuple[str, ...]
    """Of the parameters, each once."""
    name_T: Numbers
    """Of each box, the number of its parameter among the names."""
    place_T4: Numbers
    begin_T: Numbers
    """Where its bytes begin in the file."""

    @classmethod
    def of(cls, names: Sequence[str], place_T4: Numbers, begin_T: Numbers) -> "FileBoxes":
        """Boxes, each with the name of its parameter."""
        numbers: dict[str, int] = {}
        name_T = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
        return cls(tuple(numbers), name_T, place_T4, begin_T)


@dataclass(frozen=True)
class Overlaps:
    """Where stored boxes overlap wanted ones; each overlap is a box of its parameter."""

    wanted_O: Numbers
    stored_O: Numbers
    place_O4: Numbers


class BoxTable:
    """The boxes of all files of one part of a checkpoint."""

    def __init__(self, files: Iterable[FileBoxes]) -> None:
        """Put the boxes of files together, in their order."""
        numbers: dict[str, int] = {}
        names, places, begins, owners = [], [], [], []
        for owner, file in enumerate(files):
            known_N = np.array([numbers.setdefault(name, len(numbers)) for name in file.names], np.int64)
            names.append(known_N[file.name_T])
            places.append(file.place_T4)
            begins.append(file.begin_T)
            owners.append(np.full(len(file.name_T), owner, np.int64))
        self.numbers = numbers
        """Name of a parameter → its number."""
        self.name_T = _joined(names)
        self.place_T4 = np.concatenate(places) if places else np.zeros((0, 4), np.int64)
        self.begin_T = _joined(begins)
        self.file_T = _joined(owners)
        """Of each box, the number of its file."""
        self._tiled: Mapping[str, tuple[int, ...]] | None = None
        """The shapes that these boxes are known to tile."""

    def __len__(self) -> int:
        return len(self.name_T)

    def boxes(self) -> dict[str, list[Box]]:
        """Parameter → its boxes."""
        found: dict[str, list[Box]] = {name: [] for name in self.numbers}
        lists = list(found.values())
        for number, place in zip(self.name_T.tolist(), self.place_T4.tolist(), strict=True):
            lists[number].append(Box(*place))
        return found

    def boxes_of(self, names: Iterable[str]) -> dict[str, list[Box]]:
        """Some parameters → their boxes; none where they are not here."""
        found = {}
        for name in names:
            here_T = self.name_T == self.numbers.get(name, -1)
            found[name] = [Box(*place) for place in self.place_T4[here_T].tolist()]
        return found

    def untiled(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """The parameters, of those with a shape, of which the boxes do not hold each element exactly once.

        How often an element is held has a second difference, along rows and columns, that is the sum of the boxes'
        corners, +1 and −1 in turn. It is that of one box of the parameter's shape just where each element is held
        once. So the corners of all boxes are summed by their place, and compared with those of the shapes.
        """
        if self._tiled is shapes:
            return []
        names = list(shapes)
        sizes_N2 = np.array([matrix_shape(shape) for shape in shapes.values()], np.int64).reshape(-1, 2)
        to_shape_N = np.full(len(self.numbers) + 1, -1, np.int64)
        for number, name in enumerate(names):
            to_shape_N[self.numbers.get(name, -1)] = number
        to_shape_N[-1] = -1  # of those that are not here
        shape_T = to_shape_N[self.name_T]
        place_T4, shape_T = self.place_T4[shape_T >= 0], shape_T[shape_T >= 0]
        inside_T = (place_T4[:, :2] + place_T4[:, 2:] <= sizes_N2[shape_T]).all(1)
        wrong = set(shape_T[~inside_T].tolist())
        place_T4, shape_T = place_T4[inside_T], shape_T[inside_T]
        # A place for every corner of every parameter: one row and column more than it has elements.
        base_N = np.concatenate(([0], np.cumsum((sizes_N2 + 1).prod(1))))
        whole_N4 = np.concatenate((np.zeros_like(sizes_N2), sizes_N2), 1)
        keys, signs = _corners(place_T4, base_N[shape_T], sizes_N2[shape_T, 1])
        whole_keys, whole_signs = _corners(whole_N4, base_N[:-1], sizes_N2[:, 1])
        keys, signs = np.concatenate((keys, whole_keys)), np.concatenate((signs, -whole_signs))
        order = np.argsort(keys, kind="stable")
        keys, signs = keys[order], signs[order]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        sums = np.add.reduceat(signs, first) if len(first) else signs
        wrong |= set((np.searchsorted(base_N, keys[first[sums != 0]], "right") - 1).tolist())
        self._tiled = None if wrong else shapes
        return [names[number] for number in sorted(wrong)]

    def overlaps(self, names: Sequence[str], place_W4: Numbers) -> Overlaps:
        """What stored boxes hold of wanted ones.

        Args:
            names: the parameter of each wanted box.
            place_W4: all within their parameters.
        """
        order_T, start_T, end_T, base_N, rows_N = self._sorted
        name_W = np.array([self.numbers.get(name, -1) for name in names], np.int64)
        known_W = np.flatnonzero(name_W >= 0)
        name_W, place_W4 = name_W[known_W], place_W4[known_W]
        start_W = base_N[name_W] + np.minimum(place_W4[:, 0], rows_N[name_W])
        end_W = base_N[name_W] + np.minimum(place_W4[:, 0] + place_W4[:, 2], rows_N[name_W])
        first_W = np.searchsorted(end_T, start_W, "right")
        count_W = np.maximum(np.searchsorted(start_T, end_W, "left") - first_W, 0)
        wanted_O = np.repeat(np.arange(len(known_W)), count_W)
        within_O = np.arange(len(wanted_O)) - np.repeat(np.cumsum(count_W) - count_W, count_W)
        stored_O = order_T[first_W[wanted_O] + within_O]
        one_O4, other_O4 = place_W4[wanted_O], self.place_T4[stored_O]
        low_O2 = np.maximum(one_O4[:, :2], other_O4[:, :2])
        high_O2 = np.minimum(one_O4[:, :2] + one_O4[:, 2:], other_O4[:, :2] + other_O4[:, 2:])
        place_O4 = np.concatenate((low_O2, high_O2 - low_O2), 1)
        real_O = (place_O4[:, 2:] > 0).all(1)
        return Overlaps(known_W[wanted_O[real_O]], stored_O[real_O], place_O4[real_O])

    @cached_property
    def _sorted(self) -> tuple[Numbers, Numbers, Numbers, Numbers, Numbers]:
        """The boxes by their first rows, all parameters below each other.

        Returns:
            the order; first rows; the furthest end of any box so far; where each parameter begins, and its rows.
        """
        rows_N = np.zeros(len(self.numbers), np.int64)
        np.maximum.at(rows_N, self.name_T, self.place_T4[:, 0] + self.place_T4[:, 2])
        base_N = np.cumsum(rows_N) - rows_N
        start_T = base_N[self.name_T] + self.place_T4[:, 0]
        order_T = np.argsort(start_T, kind="stable")
        start_T = start_T[order_T]
        end_T = np.maximum.accumulate(start_T + self.place_T4[order_T, 2]) if len(order_T) else start_T
        return order_T, start_T, end_T, base_N, rows_N


def _joined(columns: Sequence[Numbers]) -> Numbers:
    return np.concatenate(columns) if columns else np.zeros(0, np.int64)


def _corners(place_T4: Numbers, base_T: Numbers, columns_T: Numbers) -> tuple[Numbers, Any]:
    """The four corners of boxes, each as the number of its place, and their signs."""
    row_T, column_T, rows_T, width_T = place_T4.T
    upper_T = base_T + row_T * (columns_T + 1) + column_T
    lower_T = upper_T + rows_T * (columns_T + 1)
    keys = np.concatenate((upper_T, upper_T + width_T, lower_T, lower_T + width_T))
    signs = np.repeat(np.array([1, -1, -1, 1], np.int64), len(place_T4))
    return keys, signs
