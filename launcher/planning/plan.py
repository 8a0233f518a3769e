"""`ditmoe plan`: every layout of a configuration on a number of GPUs, the best explained, and its own ranked."""

from dataclasses import asdict, dataclass
from typing import Any, Final

from ditmoe.launcher.configuration.problems import problem_list
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.planning.explanation import explanation, limit, table
from ditmoe.launcher.planning.nearest import Proposal, find_plans, least_gpus, proposals
from ditmoe.launcher.planning.needs import Sample, needs, needs_lines, sample_of, span
from ditmoe.launcher.planning.workload import legality, own_layout, workload_of
from ditmoe.model.count import count
from ditmoe.model.errors import UserError
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.estimate import Machine, Plan, plan
from ditmoe.parallel.planner.search import left_out

GIB: Final = 2**30


@dataclass(frozen=True)
class Answer:
    """All that `ditmoe plan` says."""

    config: RunConfig
    machine: Machine
    gpus: int
    why_gpus: str
    """Who says that it is so many."""
    plans: list[Plan]
    """Of all layouts that can run: those that fit first, by falling throughput."""
    own: Plan | list[str]
    """The configuration's own layout, or what keeps it from running on so many GPUs."""
    nearest: list[Proposal]
    """Where none fits."""
    least: int | None
    """The fewest GPUs that hold the run, where their number was not given and one was found."""
    sample: Sample

    @property
    def fitting(self) -> list[Plan]:
        """The plans that fit."""
        return [found for found in self.plans if self.machine.fits(found.memory)]

    @property
    def own_place(self) -> int | None:
        """Place of the own layout among those that fit, from 1; None where it does not."""
        own = self.own
        if isinstance(own, list) or not self.machine.fits(own.memory):
            return None
        same = (number for number, each in enumerate(self.fitting, 1) if _key(each) == _key(own))
        faster = sum(each.images_per_second > own.images_per_second for each in self.fitting)
        return next(same, faster + 1)


def answer(
    config: RunConfig,
    gpus: int | None,
    machine: Machine,
    imbalance: float = 1.0,
    configured: int | None = None,
) -> Answer:
    """Plan a configuration with a complete model.

    Args:
        gpus: of the whole run, as asked for.
        imbalance: the fullest expert rank gets this many times the mean.
        configured: those of the configuration, where it says.

    Raises:
        UserError: no layout can run, for a reason that the checks of a configuration name.
    """
    least = None if gpus else least_gpus(config, machine)
    number = gpus or configured or least
    if number is None:
        raise UserError(
            f"no number of {machine.gpu.name} ({machine.gpu.memory_gib:g} GiB) was found that holds the run;"
            " expected GPUs with more memory (--memory, --gpu), or --gpus to see what it lacks"
        )
    why = "as asked for" if gpus else "as the configuration says" if configured else "the fewest that hold the run"
    found = plans(config, number, machine, imbalance)
    fits = machine.fits(found[0].memory)
    return Answer(
        config=config,
        machine=machine,
        gpus=number,
        why_gpus=why,
        plans=found,
        own=_own(config, number, machine, imbalance),
        nearest=[] if fits else proposals(config, number, machine, imbalance),
        least=least,
        sample=sample_of(config),
    )


def plans(config: RunConfig, gpus: int, machine: Machine, imbalance: float = 1.0) -> list[Plan]:
    """The plans of all layouts that can run: those that fit first, by falling throughput.

    Raises:
        UserError: there is none, for a reason that the checks of a configuration name; with the nearest that fits.
    """
    found = find_plans(config, gpus, machine, imbalance)
    if found:
        return found
    plainest = Layout(1, gpus, 1, 1, 1, max(1, config.train.batch // gpus), 1)
    problems = legality(config)(plainest, workload_of(config, False, imbalance))
    text = problem_list(f"--gpus {gpus}: no layout can run, the plainest because of", problems)
    changes = [proposal.change for proposal in proposals(config, gpus, machine, imbalance)]
    raise UserError(text + (f"\nnearest that fit: {', or '.join(changes)}" if changes else ""))


def _own(config: RunConfig, gpus: int, machine: Machine, imbalance: float) -> Plan | list[str]:
    layout = own_layout(config, gpus)
    if isinstance(layout, list):
        return layout
    return plan(config.model, layout, workload_of(config, imbalance=imbalance), machine)


def _key(found: Plan) -> tuple[Layout, bool]:
    return found.layout, found.workload.recompute


def report(found: Answer, shown: int | None) -> str:
    """The table of the best plans, the first of them in words, and where the own layout ranks."""
    config, machine = found.config, found.machine
    model, gpu, fitting = config.model, machine.gpu, found.fitting
    parameters = count(model)
    missed = left_out(model, found.gpus, config.train.batch)
    lines = [
        f"{model.published_name or 'the network'}: {parameters.total:,} parameters,"
        f" {parameters.activated:,} activated, {model.tokens} tokens, {config.train.precision}",
        f"{found.gpus} × {gpu.name} ({gpu.memory_gib:g} GiB), {found.why_gpus}, batch {config.train.batch}:"
        f" {len(found.plans)} layouts can run, {len(fitting)} of them fit",
        *(
            [f"{missed:,} more layouts were not tried: of each axis only sizes that are evenly spread"]
            if missed
            else []
        ),
        *([f"the fewest that hold the run: {found.least}"] if found.least else []),
        "",
        *table((fitting or found.plans)[:shown], machine),
        "",
    ]
    if fitting:
        lines += [*explanation(fitting[0], machine), *_to_the_end(found, fitting[0])]
        lines += ["To use it, put after the configuration:", "  " + " ".join(fitting[0].overrides())]
    else:
        lines += _nothing_fits(found)
    lines += ["", *_own_words(found), "All figures are estimates; none was measured on a GPU."]
    return "\n".join(lines)


def _left_out(missed: int) -> list[str]:
    """A line where not every layout was tried."""
    words = f"{missed:,} more layouts were not tried: of each axis only sizes that are evenly spread"
    return [words] if missed else []


def _to_the_end(found: Answer, chosen: Plan) -> list[str]:
    needed = needs(found.config, chosen, found.machine, found.sample)
    return [
        f"The whole run, {found.config.train.steps:,} steps:",
        *(f"  {line}" for line in needs_lines(needed, found.machine)),
    ]


def _nothing_fits(found: Answer) -> list[str]:
    gpu, least = found.machine.gpu, found.plans[0]
    lines = [
        f"No layout fits: the one that needs least takes {least.memory.peak / GIB:.1f} GiB, and 92% of"
        f" {gpu.memory_gib:g} GiB are for a run."
    ]
    if not found.nearest:
        return [*lines, "Nothing near it was found that fits: GPUs with more memory are needed."]
    lines.append("Nearest that fit:")
    for proposal in found.nearest:
        plan, needed = proposal.plan, needs(found.config, proposal.plan, found.machine, found.sample)
        lines += [
            f"  {proposal.change}: {plan.memory.peak / GIB:.1f} GiB a rank, {needed.host_of_machine / GIB:.1f} GiB"
            f" of host memory a machine, {plan.images_per_second:,.0f} images/s, {span(needed.hours)}",
            "    " + " ".join(plan.overrides()),
        ]
    return lines


def _own_words(found: Answer) -> list[str]:
    """Where the configuration's own layout ranks among those that fit, and why there."""
    own, machine = found.own, found.machine
    if isinstance(own, list):
        return [f"The configuration's own layout cannot run on {found.gpus}:", *(f"  {line}" for line in own)]
    size = f"{own.memory.peak / GIB:.1f} GiB"
    if found.own_place is None:
        return [
            f"The configuration's own layout does not fit: it takes {size} of {machine.gpu.memory_gib:g},"
            f" most of it {_largest_part(own)}."
        ]
    best, hours = found.fitting[0], needs(found.config, own, machine, found.sample).hours
    lines = [
        f"The configuration's own layout is number {found.own_place} of {len(found.fitting)} that fit:"
        f" {own.images_per_second:,.0f} images/s, {own.step_seconds:.3f} s a step, {size}, {span(hours)}",
        f"  limited by {limit(own)}",
    ]
    if found.own_place > 1:
        lines.append(f"  {_why_behind(own, best)}")
    return lines


def _largest_part(own: Plan) -> str:
    memory = own.memory
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "the optimiser": memory.optimizer,
        "the EMA": memory.ema,
        "activations": memory.activations,
        "buffers": memory.buffers,
    }
    name = max(parts, key=lambda part: parts[part])
    return f"{name}, {parts[name] / GIB:.1f} GiB"


def _why_behind(own: Plan, best: Plan) -> str:
    """What the own layout loses its time with, or what is better in the best where they are equally fast."""
    slower = own.step_seconds / best.step_seconds - 1
    losses = {part: own.seconds[part] - best.seconds[part] for part in own.seconds}
    part = max(losses, key=lambda name: losses[name])
    if slower < 0.005:
        return (
            f"as fast as the best, which has {best.layout.accumulation} micro-steps and takes"
            f" {best.memory.peak / GIB:.1f} GiB; it has {own.layout.accumulation}"
        )
    return f"{slower:.1%} slower than the best: {part} takes {losses[part]:.3f} s more"


def as_json(found: Answer, shown: int | None) -> dict[str, Any]:
    """The same as plain data, numbers exact.

    Args:
        shown: plans at most, of those that fit; None: all, also those that do not fit.
    """
    config, machine, own = found.config, found.machine, found.own
    parameters = count(config.model)
    chosen = found.plans if shown is None else found.fitting[:shown]
    return {
        "gpus": found.gpus,
        "gpu": asdict(machine.gpu),
        "efficiency": machine.efficiency,
        "fewest_gpus": found.least,
        "parameters": parameters.total,
        "activated_parameters": parameters.activated,
        "batch": config.train.batch,
        "steps": config.train.steps,
        "layouts": {
            "can_run": len(found.plans),
            "fit": len(found.fitting),
            "not_tried": left_out(config.model, found.gpus, config.train.batch),
        },
        "plans": [_plain(each, found) for each in chosen],
        "own": {"problems": own} if isinstance(own, list) else {"place": found.own_place, **_plain(own, found)},
        "nearest": [
            {"change": each.change, "gpus": each.gpus, **_plain(each.plan, found)} for each in found.nearest
        ],
    }


def _plain(plan: Plan, found: Answer) -> dict[str, Any]:
    """A plan as plain data."""
    part, share = plan.limit
    return {
        "layout": vars(plan.layout),
        "activation_checkpointing": plan.workload.recompute,
        "fits": found.machine.fits(plan.memory),
        "memory_bytes": vars(plan.memory),
        "sent_bytes": dict(plan.traffic),
        "bubble": plan.bubble,
        "seconds": plan.seconds,
        "step_seconds": plan.step_seconds,
        "images_per_second": plan.images_per_second,
        "mfu": plan.mfu,
        "limited_by": {"part": part, "share": share, "compute_waits_for": plan.pace},
        "run": needs(found.config, plan, found.machine, found.sample).plain(),
        "overrides": plan.overrides(),
    }
