"""Fresh values, drawn a block of rows at a time, so that a rank holds no more than a block beside what it keeps.

The values of a parameter are one stream of draws that begins at its first element (`model/initialise.py`). A rank
that keeps a part of it draws up to the end of that part, and drops what lies before. Its numbers are those of one
draw for the whole parameter, because torch draws uniform numbers one after the other, and normal ones by 16.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ditmoe.model.initialise import initial_value
from ditmoe.parallel.boxes import Box, matrix_shape
from ditmoe.parallel.engine.initial import Part, in_threads

BLOCK_BYTES: Final = 2**18
"""That are drawn at once, but for parameters of which 16 rows are more."""
_TOGETHER: Final = 16
"""Normal numbers that torch makes of each other; with fewer it draws in another way."""
_DRAWS: Final = (torch.Tensor.uniform_, torch.Tensor.normal_)
_CONSTANTS: Final = {torch.zeros: 0.0, torch.ones: 1.0}


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
        how = _how(part.name, part.shape, self.seed)
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


def _how(name: str, shape: tuple[int, ...], seed: int) -> Callable[[Tensor], Tensor] | float:
    """What fills a block of a parameter with its next numbers; or the one number that they all are."""
    told = _Told()
    with told:
        initial_value(name, shape, seed)
    assert told.how is not None
    return told.how


class _Told(TorchFunctionMode):
    """Has `initial_value` say what it would do, without memory: one draw into all of it, or one constant."""

    def __init__(self) -> None:
        super().__init__()
        self.how: Callable[[Tensor], Tensor] | float | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if function in _CONSTANTS:
            self.how = _CONSTANTS[function]
        elif function in _DRAWS:
            self.how = lambda block: function(block, *args[1:], **named)
            return args[0]
        else:
            assert function is torch.empty, f"initial values are made by {function}, and not by one draw"
        return torch.empty(*args, **named, device="meta")
