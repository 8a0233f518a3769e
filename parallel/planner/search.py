"""Every layout of a number of GPUs, and the fastest that fits."""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from math import isqrt
from typing import Final, NamedTuple

from ditmoe.model.config import ModelConfig
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.estimate import Machine, Plan, plan
from ditmoe.parallel.planner.memory import Workload

MOST_CANDIDATES: Final = 4096
"""Layouts that are tried: 4,096 GPUs have 3,300."""
ZERO_STAGES: Final = range(4)
_MOST_SIZES: Final = (2**16, 64, 48, 32, 24, 16, 12, 10, 8, 7, 6, 5, 4)
"""Sizes of an axis that are tried, the first that gives few enough layouts: 4⁴ × 4 at last."""


def candidates(config: ModelConfig, gpus: int, batch: int, offload: bool = False) -> Iterator[Layout]:
    """The layouts whose numbers divide; whether they can run is for others to check.

    These are all of them, unless they are more than MOST_CANDIDATES: then of each axis, and of the micro-batches,
    only so many sizes, evenly spread, that the layouts are no more.

    Args:
        batch: images of one optimiser step.
        offload: the optimiser's state is in host memory.
    """
    choices = (_grids(config, gpus, batch, most) for most in _MOST_SIZES)
    grids = next(grids for grids in choices if sum(grid.layouts for grid in grids) <= MOST_CANDIDATES)
    for pipe, tensor, data, experts, micro_batches in grids:
        for expert in experts:
            for zero in ZERO_STAGES:
                for micro_batch in micro_batches:
                    accumulation = batch // data // micro_batch
                    yield Layout(pipe, data, expert, tensor, zero, micro_batch, accumulation, offload)


def left_out(config: ModelConfig, gpus: int, batch: int) -> int:
    """The number of layouts whose numbers divide and that are not among the `candidates`."""
    every = sum(grid.layouts for grid in _grids(config, gpus, batch, _MOST_SIZES[0]))
    return 0 if every <= MOST_CANDIDATES else every - sum(1 for _ in candidates(config, gpus, batch))


class _Grid(NamedTuple):
    """Sizes of `pipe`, `tensor` and `data`, and what goes with them."""

    pipe: int
    tensor: int
    data: int
    experts: list[int]
    micro_batches: list[int]

    @property
    def layouts(self) -> int:
        """How many these are."""
        return len(self.experts) * len(ZERO_STAGES) * len(self.micro_batches)


def _grids(config: ModelConfig, gpus: int, batch: int, most: int) -> list[_Grid]:
    """Those whose numbers divide, with `most` sizes of each axis."""
    found = []
    for pipe in _spread((number for number in divisors(gpus) if number <= config.depth), most):
        for tensor in _spread((number for number in divisors(gpus // pipe) if config.heads % number == 0), most):
            data = gpus // (pipe * tensor)
            if batch % data == 0:
                experts = [number for number in divisors(config.experts or 1) if data % number == 0]
                found.append(
                    _Grid(pipe, tensor, data, _spread(experts, most), _spread(divisors(batch // data), most))
                )
    return found


def _spread(numbers: Iterable[int], most: int) -> list[int]:
    """Evenly spread ones among some, the first and the last included."""
    every = list(numbers)
    if len(every) <= most:
        return every
    return [every[place * (len(every) - 1) // (most - 1)] for place in range(most)]


@lru_cache(maxsize=1024)
def divisors(number: int) -> tuple[int, ...]:
    """All of them, from 1 up."""
    small = [candidate for candidate in range(1, isqrt(number) + 1) if number % candidate == 0]
    return tuple(sorted({*small, *(number // candidate for candidate in small)}))


EQUAL: Final = 0.005
"""Layouts whose throughput differs by less, as a share, are taken for equal: no estimate is that exact."""


def search(
    config: ModelConfig,
    layouts: Iterable[Layout],
    workloads: Iterable[Workload],
    machine: Machine,
    legal: Callable[[Layout, Workload], bool],
) -> list[Plan]:
    """The plans of all legal layouts: those that fit first, each part by falling throughput.

    Among equals the one with the fewest micro-steps comes first, which has the fewest calls and messages that
    nothing here prices, and of those the one that needs least memory. Plans that do not fit go by memory.

    Args:
        legal: whether a layout can run.
    """
    choices = list(workloads)
    plans = [
        plan(config, layout, workload, machine)
        for layout in layouts
        for workload in choices
        if legal(layout, workload)
    ]
    fitting = [found for found in plans if machine.fits(found.memory)]
    others = [found for found in plans if not machine.fits(found.memory)]
    return [*_by_speed(fitting), *sorted(others, key=lambda found: found.memory.peak)]


def _by_speed(plans: list[Plan]) -> list[Plan]:
    """Fastest first; runs of equals, each counted from its fastest, by micro-steps and then by memory."""
    ordered: list[Plan] = []
    equals: list[Plan] = []
    for found in [*sorted(plans, key=lambda found: -found.images_per_second), None]:
        if found is None or (equals and found.images_per_second < (1 - EQUAL) * equals[0].images_per_second):
            ordered += sorted(equals, key=lambda each: (each.layout.accumulation, each.memory.peak))
            equals = []
        if found is not None:
            equals.append(found)
    return ordered
