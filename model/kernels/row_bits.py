"""Products of float32 on a CPU whose rows have the same bits among any number of rows.

MKL chooses kernels by shape, and with several threads some add up in another order than others: with two threads
64 to 192 rows of 1,536 numbers were rounded otherwise than fewer or more. Which shapes do so is not documented,
and differs between processors. So sizes are tried once, on random numbers, where another order shows in some of
thousands of results, and rows are computed in pieces of sizes that agree.

R rows, I in, O out.
"""

from collections.abc import Iterator
from functools import cache
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES: Final = (*range(16, 512, 16), *range(512, 1025, 32))
"""Rows of a piece: a multiple of the 16 of a vector kernel, and few, since each is tried."""
_WASTE: Final = 1.25
"""Rows computed for one that is wanted, at most, where a piece is filled up so that there are fewer pieces."""


def linear_by_pieces(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """x·weightᵀ, `[R, O]`, without a gradient.

    A row's bits depend on itself, the weight, the processor and the number of torch's threads.
    """
    rows = len(x_RI)
    outer, inner = weight_OI.shape
    pieces = tuple(pieces_of(rows, agreeing_sizes(inner, outer, torch.get_num_threads())))
    if pieces == (rows,):
        return torch.mm(x_RI, weight_OI.t())
    out_RO = x_RI.new_empty(sum(pieces), outer)  # the last piece may have more rows than are wanted
    first = 0
    for size in pieces:
        piece = x_RI[first : first + size]
        if len(piece) < size:
            piece = F.pad(piece, (0, 0, 0, size - len(piece)))
        torch.mm(piece, weight_OI.t(), out=out_RO[first : first + size])
        first += size
    return out_RO[:rows]


def pieces_of(rows: int, sizes: tuple[int, ...]) -> Iterator[int]:
    """Ascending sizes of which products are to be made for so many rows; the last may be filled up."""
    while rows > 0:
        enough = next((size for size in sizes if size >= rows), None)
        if enough is None or enough > max(_WASTE * rows, sizes[0]):
            enough = max((size for size in sizes if size <= rows), default=sizes[0])
        yield enough
        rows -= enough


@cache
def agreeing_sizes(inner: int, outer: int, threads: int) -> tuple[int, ...]:
    """Those of `SIZES` whose products agree: the most that do; ascending.

    `threads` is the number that torch has now: a key of what was found.
    """
    assert threads == torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    x_RI = torch.randn(SIZES[-1], inner, generator=generator)
    weight_OI = torch.randn(outer, inner, generator=generator)
    alike: list[tuple[Tensor, list[int]]] = []
    for size in reversed(SIZES):
        found = torch.mm(x_RI[:size], weight_OI.t())
        for largest, sizes in alike:
            if torch.equal(found, largest[:size]):
                sizes.append(size)
                break
        else:
            alike.append((found, [size]))
    most: list[int] = max((sizes for _, sizes in alike), key=len)
    return tuple(reversed(most))
