"""What this machine can do at most, measured where the run's processes are: products of matrices, and memory."""

import time
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
import torch.distributed as dist

_SIDE: Final = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices, which fit the caches of a CPU and fill a GPU."""
_COPIED: Final = {"cpu": 2**26, "cuda": 2**30}
"""Bytes of what is copied: more than a cache holds."""
_REPEATS: Final = 5
_SECONDS: Final = 0.05
"""How long one repeat takes at least."""


class Limits(NamedTuple):
    """Of one rank, while all others work as hard."""

    flops: float
    """Operations of products of large matrices in the run's number type, FLOP/s."""
    bandwidth: float
    """Bytes read and written together, of a copy in memory, bytes/s."""


def measure_limits(device: torch.device, precision: str) -> Limits:
    """Measure them in about a second, on all ranks at once, for they may share a memory; a collective call.

    Args:
        precision: `fp32` or `bf16`.
    """
    kind = device.type
    side, dtype = _SIDE[kind], torch.bfloat16 if precision == "bf16" else torch.float32
    first, second = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(first)
    source = torch.zeros(_COPIED[kind], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    dist.barrier()
    flops = 2 * side**3 / _best_seconds(lambda: torch.mm(first, second, out=product), device)
    dist.barrier()
    bandwidth = 2 * _COPIED[kind] / _best_seconds(lambda: target.copy_(source), device)
    dist.barrier()
    return Limits(flops, bandwidth)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
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
