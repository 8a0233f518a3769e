"""The mixture layer against a dense SwiGLU of equal activated FLOPs, and against a loop over its experts."""

from collections.abc import Iterator

import torch

from benchmarks.moe_layer import Case, rounds
from benchmarks.suite.figure import Figure, duration
from benchmarks.suite.machine import DTYPES
from benchmarks.suite.settings import Settings

TOKENS = 4096
ACTIVE, SHARED = 2, 2


def measure(settings: Settings) -> Iterator[Figure]:
    """Both widths, both precisions, with and without the backward pass."""
    for hidden in (32,) if settings.small else (384, 768):
        tokens = 64 if settings.small else TOKENS * (8 if settings.device.type == "cuda" else 1)
        for precision, dtype in DTYPES.items():
            case = Case(hidden, tokens, 8, ACTIVE, SHARED, dtype, settings.device)
            flops = 2 * tokens * 3 * hidden * hidden * (4 * ACTIVE + SHARED)
            for backward in (False, True):
                torch.manual_seed(0)
                layer, dense, loop = rounds(case, backward, settings.rounds_of(5))
                what = f"mixture layer {hidden}, {precision}, {'both passes' if backward else 'forward'}"
                limit = settings.limits.seconds(precision, flops * (3 if backward else 1))
                yield duration(f"{what} / loop", layer, loop, limit=limit, against="a loop over its experts")
                yield duration(f"{what} / dense", layer, dense, limit=limit, against="a dense SwiGLU, equal FLOPs")
