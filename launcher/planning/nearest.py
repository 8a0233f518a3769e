"""What is nearest to a run that does not fit: with another number of GPUs, another batch, or offload."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.planning.workload import legality, workload_of
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.estimate import Machine, Plan, fullest_stage
from ditmoe.parallel.planner.search import candidates, search

MOST_NEIGHBOURS: Final = 32
"""Numbers of GPUs, and batches, that are tried on each side."""
MOST_GPUS: Final = 2**17


@dataclass(frozen=True)
class Proposal:
    """A run that fits."""

    change: str
    """What is other than asked for, as keys or options."""
    plan: Plan
    """The fastest of its layouts."""

    @property
    def gpus(self) -> int:
        """Of the whole run."""
        return self.plan.layout.processes


def find_plans(config: RunConfig, gpus: int, machine: Machine, imbalance: float = 1.0) -> list[Plan]:
    """The plans of all layouts that can run: those that fit first, by falling throughput; none where none can."""
    legal = legality(config)
    workloads = [workload_of(config, recompute, imbalance) for recompute in (False, True)]
    layouts = candidates(config.model, gpus, config.train.batch, config.parallel.offload)
    return search(config.model, layouts, workloads, machine, lambda *tried: not legal(*tried))


def proposals(config: RunConfig, gpus: int, machine: Machine, imbalance: float = 1.0) -> list[Proposal]:
    """What is nearest to a run of which no layout fits: at most one of each kind."""
    found = []
    if not config.parallel.offload and not machine.gpu.is_cpu:
        offloaded = _with(config, offload=True)
        found.append(_proposal(offloaded, gpus, machine, imbalance, "parallel.offload=true"))
    batch = nearest_batch(config, gpus, machine)
    if batch is not None:
        found.append(_proposal(_with(config, batch=batch), gpus, machine, imbalance, f"train.batch={batch}"))
    number = nearest_gpus(config, gpus, machine)
    if number is not None:
        found.append(_proposal(config, number, machine, imbalance, f"--gpus {number}"))
    return [proposal for proposal in found if proposal is not None]


def _proposal(config: RunConfig, gpus: int, machine: Machine, imbalance: float, change: str) -> Proposal | None:
    plans = find_plans(config, gpus, machine, imbalance)
    return Proposal(change, plans[0]) if plans and machine.fits(plans[0].memory) else None


def nearest_batch(config: RunConfig, gpus: int, machine: Machine) -> int | None:
    """The batch nearest to the configuration's with which a layout fits; None where there is none."""
    batch = config.train.batch
    if can_run(config, gpus):
        # Smaller ones have fewer micro-batches on their way; no larger one needs less memory.
        return next((each for each in _halves(batch) if holds(_with(config, batch=each), gpus, machine)), None)
    near = batch // gpus
    multiples = sorted(
        {gpus * each for each in range(max(1, near - MOST_NEIGHBOURS), near + MOST_NEIGHBOURS)},
        key=lambda each: abs(each - batch),
    )
    return next((each for each in multiples if holds(_with(config, batch=each), gpus, machine)), None)


def nearest_gpus(config: RunConfig, gpus: int, machine: Machine) -> int | None:
    """The number of GPUs nearest to one that does not do, on which a layout fits; None where there is none."""
    if not can_run(config, gpus):
        near = chain.from_iterable((gpus - each, gpus + each) for each in range(1, MOST_NEIGHBOURS))
        found = next((each for each in near if each > 0 and holds(config, each, machine)), None)
        if found is not None:
            return found
    return _more_gpus(config, gpus, machine)


def least_gpus(config: RunConfig, machine: Machine) -> int | None:
    """The smallest number of GPUs found on which a layout fits; None where none is."""
    return 1 if holds(config, 1, machine) else _more_gpus(config, 1, machine)


def _more_gpus(config: RunConfig, gpus: int, machine: Machine) -> int | None:
    """A number above: the first power of two times it that does, or one between that and the half."""
    upper = gpus * 2
    while upper <= MOST_GPUS and not holds(config, upper, machine):
        upper *= 2
    if upper > MOST_GPUS:
        return None
    lower = upper // 2
    step = max(1, (upper - lower) // MOST_NEIGHBOURS)
    if upper > machine.gpu.gpus_per_node:  # whole machines
        whole = machine.gpu.gpus_per_node
        step = -(-step // whole) * whole
        lower = lower // whole * whole
    return next((each for each in range(lower + step, upper, step) if holds(config, each, machine)), upper)


def can_run(config: RunConfig, gpus: int) -> bool:
    """Whether any layout can run on so many GPUs, whatever memory they have."""
    legal, workload = legality(config), workload_of(config)
    layouts = candidates(config.model, gpus, config.train.batch, config.parallel.offload)
    return any(not legal(layout, workload) for layout in layouts)


def holds(config: RunConfig, gpus: int, machine: Machine) -> bool:
    """Whether a layout that can run fits on so many GPUs."""
    legal = legality(config)
    grids: dict[tuple[int, ...], list[Layout]] = {}
    for layout in candidates(config.model, gpus, config.train.batch, config.parallel.offload):
        axes = (layout.pipe, layout.data, layout.expert, layout.tensor, layout.zero)
        grids.setdefault(axes, []).append(layout)
    for recompute in (True, False):
        workload = workload_of(config, recompute)
        for layouts in grids.values():
            # Of the micro-batches that can run, the smallest needs least memory.
            runs = next((each for each in layouts if not legal(each, workload)), None)
            if runs is not None and machine.fits(fullest_stage(config.model, runs, workload)[1]):
                return True
    return False


def _with(config: RunConfig, *, batch: int | None = None, offload: bool | None = None) -> RunConfig:
    changed: dict[str, Any] = {}
    if batch is not None:
        changed["train"] = config.train.model_copy(update={"batch": batch})
    if offload is not None:
        changed["parallel"] = config.parallel.model_copy(update={"offload": offload})
    return config.model_copy(update=changed)


def _halves(number: int) -> Iterator[int]:
    while number % 2 == 0:
        number //= 2
        yield number
