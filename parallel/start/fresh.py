"""Fresh values, drawn a block of rows at a time, so that a rank holds no more than a block beside what it keeps.

The values of a parameter are one stream of draws that begins at its first element (`model/initialise.py`). A rank
that keeps a part of it draws up to the end of that part, and drops what lies before. Its numbers are those of one
draw for the whole parameter, because torch draws uniform numbers one after the other, and normal ones by 16.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ditmoe.model.initialise import initial_rule
from ditmoe.parallel.boxes import Box, matrix_shape
from ditmoe.parallel.engine.initial import Part, in_threads

BLOCK_BYTES: Final = 2**18
"""That are drawn at once, but for parameters of which 16 rows are more."""
_TOGETHER: Final = 16
"""Normal numbers that torch makes of each other; with fewer it draws in another way."""


class FreshPart(NamedTuple):
    """Boxes of a parameter that get fresh values."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    boxes: Sequence[tuple[Box, Tensor]]
    """Each with its memory `[box.rows, box.columns]`."""
    scale: float = 1.0
    """What the values are multiplied by."""


@dataclass(frozen=True)
class Fresh:
    """The values of a network that starts from nothing but a seed."""

    seed: int

    def fill(self, parts: Sequence[Part]) -> None:
        """Draw what is kept of each parameter, in a few threads."""
        self.draw([FreshPart(part.name, part.shape, list(part.boxes())) for part in parts])

    def draw(self, parts: Sequence[FreshPart]) -> None:
        """The same of some boxes."""
        in_threads(self._draw, parts)

    def _draw(self, part: FreshPart) -> None:
        how = initial_rule(part.name, part.shape, self.seed)
        if isinstance(how, float):
            for _, memory_RC in part.boxes:
                memory_RC.fill_(how * part.scale)
            return
        rows, columns = matrix_shape(part.shape)
        end = max(box.row + box.rows for box, _ in part.boxes)
        for first, count in _blocks(rows, columns, end):
            block_RC = how(torch.empty(count, columns))
            drawn = Box(first, 0, count, columns)
            for box, memory_RC in part.boxes:
                wanted = box.overlap(drawn)
                if wanted is not None:
                    values_RC = block_RC[wanted.within(drawn).slices]
                    memory_RC[wanted.within(box).slices] = values_RC if part.scale == 1 else values_RC * part.scale


def _blocks(rows: int, columns: int, end: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each block, up to the one that has the last row before `end`."""
    step = _TOGETHER * max(1, BLOCK_BYTES // (4 * _TOGETHER * columns))
    first = 0
    while first < end:
        count = min(step, rows - first)
        if (rows - first - count) * columns < _TOGETHER:
            count = rows - first
        yield first, count
        first += count
