"""Every layout of a number of GPUs, and the fastest that fits."""

from collections.abc import Callable, Iterable, Iterator
from math import isqrt

from ditmoe.model.config import ModelConfig
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.estimate import Machine, Plan, plan
from ditmoe.parallel.planner.memory import Workload


def candidates(config: ModelConfig, gpus: int, batch: int, offload: bool = False) -> Iterator[Layout]:
    """Every layout whose numbers divide; whether it can run is for others to check.

    Args:
        batch: images of one optimiser step.
        offload: the optimiser's state is in host memory.
    """
    experts = divisors(config.experts) if config.experts else [1]
    for pipe in (number for number in divisors(gpus) if number <= config.depth):
        for tensor in (number for number in divisors(gpus // pipe) if config.heads % number == 0):
            data = gpus // (pipe * tensor)
            if batch % data:
                continue
            for expert in (number for number in experts if data % number == 0):
                for zero in range(4):
                    for micro_batch in divisors(batch // data):
                        accumulation = batch // data // micro_batch
                        yield Layout(pipe, data, expert, tensor, zero, micro_batch, accumulation, offload)


def divisors(number: int) -> list[int]:
    """All of them, from 1 up."""
    small = [candidate for candidate in range(1, isqrt(number) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})


def search(
    config: ModelConfig,
    layouts: Iterable[Layout],
    workloads: Iterable[Workload],
    machine: Machine,
    legal: Callable[[Layout, Workload], bool],
) -> list[Plan]:
    """The plans of all legal layouts: those that fit first, each part by falling throughput, then by memory.

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
    return sorted(
        plans, key=lambda found: (not machine.fits(found.memory), -found.images_per_second, found.memory.peak)
    )
