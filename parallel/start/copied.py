"""First values that are copied from another network's weights, with fresh ones where it has none.

`model/weights/transfer.py` says what each parameter starts as. Here the boxes that this rank keeps are made, and
nothing else of the source is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ditmoe.model.weights.transfer import Value
from ditmoe.parallel.boxes import Box, matrix_shape
from ditmoe.parallel.checkpoint.box_storage import Piece
from ditmoe.parallel.engine.initial import Part
from ditmoe.parallel.start.fresh import Fresh, FreshPart
from ditmoe.parallel.start.source import Source


@dataclass(frozen=True)
class Copied:
    """The values of a network that starts from a source."""

    values: Mapping[str, Value]
    """What each canonical parameter starts as."""
    source: Source
    fresh: Fresh

    def fill(self, parts: Sequence[Part]) -> None:
        """Draw what is fresh, then read what is copied; every rank calls it once.

        Raises:
            UserError: the source is damaged, or cannot be read: the same on all ranks. What was filled is then
                worth nothing.
        """
        self.fresh.draw([fresh for part in parts if (fresh := self._fresh(part)) is not None])
        self.source.fill([piece for part in parts for piece in self._pieces(part)])

    def _fresh(self, part: Part) -> FreshPart | None:
        """The boxes that are not copied as a whole."""
        value, copied = self.values[part.name], self._copied(part)
        boxes = [(box, memory) for box, memory in part.boxes() if copied is None or box.overlap(copied) != box]
        scale = value.scale if copied is None else value.beside
        return FreshPart(part.name, part.shape, boxes, scale) if boxes else None

    def _pieces(self, part: Part) -> Iterator[Piece]:
        """What is read for a part: boxes of the source's parameter."""
        value, copied = self.values[part.name], self._copied(part)
        if value.source is None or copied is None:
            return
        shape = self.source.shapes[value.source]
        down = matrix_shape(shape)[0] - (copied.row + copied.rows)
        for box, memory_RC in part.boxes():
            wanted = box.overlap(copied)
            if wanted is not None:
                there = replace(wanted, row=wanted.row + down)
                yield Piece(value.source, shape, there, memory_RC[wanted.within(box).slices], value.scale)

    def _copied(self, part: Part) -> Box | None:
        """Where in the parameter the copy lies; None: nowhere. It ends where the source's parameter ends."""
        value = self.values[part.name]
        if value.source is None:
            return None
        rows, columns = matrix_shape(self.source.shapes[value.source])
        if value.kept == "last row":
            return Box(matrix_shape(part.shape)[0] - 1, 0, 1, columns)
        return Box(0, 0, rows, columns)
