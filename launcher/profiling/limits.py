"""What this machine can do at most: products of matrices, and moving memory.

The best of many repetitions counts, because whatever else the machine does only slows it.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ditmoe.model.kernels.products import in_onednn, product

Shape = tuple[int, int, int]
"""Rows, inner size and columns of a product."""
SHAPES: Final[dict[str, tuple[Shape, ...]]] = {
    "cpu": ((256, 384, 1536), (1024, 384, 768), (1024, 1024, 1024), (1024, 768, 3072)),
    "cuda": ((8192, 8192, 8192), (16384, 4096, 4096)),
}
"""Those of networks, which fit the caches of a CPU and fill a GPU."""
NUMBERS: Final = {"cpu": 2**24, "cuda": 2**28}
"""Of the arrays that are moved: more than a cache holds."""
_REPEATS: Final = 7
_SECONDS: Final = 0.03
"""How long one repeat takes at least."""


class Limits(NamedTuple):
    """Of one rank, while all others work as hard."""

    flops: float
    """Operations of products of large matrices in the run's number type, FLOP/s."""
    bandwidth: float
    """Bytes read and written together, bytes/s."""


def measure_limits(device: torch.device, precision: str) -> Limits:
    """Measure them in a second or two, on all ranks at once, for they may share a memory; a collective call.

    Args:
        precision: `fp32` or `bf16`.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    dist.barrier()
    flops = product_rate(device, dtype, SHAPES[device.type])
    dist.barrier()
    bandwidth = memory_rate(device, NUMBERS[device.type])
    dist.barrier()
    return Limits(flops, bandwidth)


@torch.inference_mode()
def product_rate(device: torch.device, dtype: torch.dtype, shapes: Sequence[Shape]) -> float:
    """FLOP/s of the fastest of these products, by torch's own or by the network's ways to multiply."""
    best = 0.0
    for rows, inner, columns in shapes:
        x, weight = (torch.randn(size, inner, device=device).to(dtype) for size in (rows, columns))
        ways: list[Callable[[], object]] = [lambda x=x, weight=weight: F.linear(x, weight)]  # type: ignore[misc]
        if in_onednn(x, weight):
            ways.append(lambda x=x, weight=weight: product(x, weight))  # type: ignore[misc]
        best = max(best, *(2 * rows * inner * columns / best_seconds(way, device) for way in ways))
    return best


@torch.inference_mode()
def memory_rate(device: torch.device, numbers: int) -> float:
    """Bytes/s of a sum of two arrays of so many float32: two are read and one is written."""
    first, second, total = (torch.ones(numbers, device=device) for _ in range(3))
    return 3 * total.nbytes / best_seconds(lambda: torch.add(first, second, out=total), device)


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call in the fastest of a few runs of many."""
    calls, best = 1, float("inf")
    while (taken := _seconds(work, calls, device)) < _SECONDS:
        calls = max(2 * calls, round(1.2 * calls * _SECONDS / max(taken, 1e-6)))
    for _ in range(_REPEATS):
        best = min(best, _seconds(work, calls, device) / calls)
    return best


def _seconds(work: Callable[[], object], calls: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
