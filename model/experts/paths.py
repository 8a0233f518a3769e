"""Which way the experts' products are computed: chosen by device, number type and shape, in one place.

A way decides how rows are laid out (`rows_together`): on GPUs each expert's rows begin at a multiple of some
number and none is without rows. So every shape is known without asking the device, which makes the host wait, and
no kernel meets a group without rows, which not all of them handle.
"""

from functools import lru_cache
from typing import Final, Literal

import torch
from torch import Tensor

Path = Literal["grouped", "batched", "by_pieces", "in_turn", "one_by_one"]
"""`grouped`: one launch for all experts; `batched`: blocks of rows, each with its expert's weights, in one batched
product; `in_turn`: each expert's rows on a CPU; `by_pieces`: likewise, where a row's bits must not depend on how
many there are; `one_by_one`: what they compute, written plainly, which the others are compared with."""

_GROUPED_ROWS: Final = 16
"""Rows that an expert's begin at a multiple of: 16 bytes or more in each number type."""
_LONGEST_BLOCK: Final = 4096


def expert_path(x_AD: Tensor, width: int) -> Path:
    """The way for these rows and experts of this width.

    Measured (benchmarks/moe_layer.py): on a CPU one expert after the other stays in cache and is as fast as or
    faster than grouped products. On GPUs a kernel for all experts exists for bfloat16 on Hopper and the data
    centres' Blackwell, for rows of a multiple of 16 bytes; elsewhere torch computes group by group, and asks the
    device for their sizes in each product.
    """
    if x_AD.is_cuda:
        fits = x_AD.dtype == torch.bfloat16 and x_AD.shape[1] % 8 == 0 and width % 8 == 0
        return "grouped" if fits and _has_grouped_kernel(x_AD.device) else "batched"
    if not torch.is_grad_enabled() and x_AD.dtype == torch.float32:
        return "by_pieces"
    return "in_turn"


def rows_together(path: Path, assignments: int, experts: int) -> int | None:
    """Rows that each expert's begin at a multiple of, none being without rows; None: they follow each other.

    Blocks are a quarter of an expert's mean share: their size depends on the batch's alone.
    """
    if path == "grouped":
        return _GROUPED_ROWS
    if path == "batched":
        return min(_LONGEST_BLOCK, block_rows(assignments, experts))
    return None


def block_rows(assignments: int, experts: int) -> int:
    """Rows of a block: a quarter of an expert's mean share, a multiple of the 16 rows of a vector kernel."""
    return 16 * max(1, assignments // (64 * experts))


@lru_cache
def _has_grouped_kernel(device: torch.device) -> bool:
    """Hopper and the data centres' Blackwell (sm90, sm100); torch has none for others."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)
