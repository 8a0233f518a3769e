"""`ditmoe plan`: every layout of a configuration on a number of GPUs, and the best one explained."""

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from ditmoe.launcher.configuration.checks import layout_problems
from ditmoe.launcher.configuration.problems import problem_list
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.configuration.sections import TrainConfig
from ditmoe.model.count import count
from ditmoe.model.errors import UserError
from ditmoe.model.settings import message_of
from ditmoe.parallel.config import ParallelConfig
from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.estimate import Machine, Plan
from ditmoe.parallel.planner.links import spreads
from ditmoe.parallel.planner.memory import Workload
from ditmoe.parallel.planner.search import candidates, left_out, search
from ditmoe.parallel.planner.zero import ZeroSettings

GIB = 2**30


def plans(config: RunConfig, gpus: int, machine: Machine, imbalance: float = 1.0) -> list[Plan]:
    """The plans of all layouts that can run: those that fit first, by falling throughput.

    Args:
        config: with a complete model.
        imbalance: the fullest expert rank gets this many times the mean.

    Raises:
        UserError: there is none, for a reason that the checks of a configuration name.
    """
    zero = ZeroSettings.from_extra(config.deepspeed)
    workloads = [Workload(config.train.precision, recompute, imbalance, zero) for recompute in (False, True)]
    legal = _legality(config)
    layouts = candidates(config.model, gpus, config.train.batch, config.parallel.offload)
    found = search(config.model, layouts, workloads, machine, lambda *tried: not legal(*tried))
    if not found:
        problems = legal(Layout(1, gpus, 1, 1, 1, max(1, config.train.batch // gpus), 1), workloads[0])
        raise UserError(problem_list(f"--gpus {gpus}: no layout can run, the plainest because of", problems))
    return found


def _legality(config: RunConfig) -> Callable[[Layout, Workload], list[str]]:
    """What `ditmoe train` would say to a layout of this configuration: nothing, if it can run."""
    sections = {name: getattr(config, name) for name in RunConfig.model_fields}

    def problems(layout: Layout, workload: Workload) -> list[str]:
        try:
            parallel = ParallelConfig(
                pipe=layout.pipe,
                tensor=layout.tensor,
                expert=layout.expert,
                data=layout.data,
                zero=layout.zero,
                offload=layout.offload,
                activation_checkpointing=workload.recompute,
            )
        except ValidationError as error:
            return [f"parallel.{'.'.join(map(str, e['loc']))}: {message_of(e)}" for e in error.errors()]
        train: TrainConfig = config.train.model_copy(update={"micro_batch": layout.micro_batch})
        return layout_problems({**sections, "parallel": parallel, "train": train}, layout.processes)

    return problems


def report(config: RunConfig, found: list[Plan], machine: Machine, shown: int | None) -> str:
    """The table of the best plans and the first of them in words."""
    fitting = [plan for plan in found if machine.fits(plan.memory)]
    model, gpu = config.model, machine.gpu
    parameters = count(model)
    first = found[0].layout
    lines = [
        f"{model.preset or 'the network'}: {parameters.total:,} parameters, {parameters.activated:,} activated,"
        f" {model.tokens} tokens, {config.train.precision}",
        f"{first.processes} × {gpu.name} ({gpu.memory_gib:g} GiB), batch {config.train.batch}:"
        f" {len(found)} layouts can run, {len(fitting)} of them fit",
        *_left_out(config, first),
        "",
        *_table((fitting or found)[:shown], machine),
    ]
    if fitting:
        lines += ["", *explanation(fitting[0], machine)]
    else:
        lines += ["", "No layout fits. The one above that needs least memory is a beginning: more GPUs, or"]
        lines[-1] += " GPUs with more memory, are needed."
    return "\n".join(lines)


def _left_out(config: RunConfig, layout: Layout) -> list[str]:
    """A line where not every layout was tried."""
    number = left_out(config.model, layout.processes, config.train.batch)
    return (
        [f"{number:,} more layouts were not tried: of each axis only sizes that are evenly spread"]
        if number
        else []
    )


def _table(rows: list[Plan], machine: Machine) -> list[str]:
    lines = [
        "pipe tensor expert  data ZeRO micro recompute |"
        "  weights   grads   optim     EMA activat buffers    peak GiB | bubble  step s  images/s    MFU"
    ]
    for plan in rows:
        layout, memory = plan.layout, plan.memory
        parts = (
            memory.weights,
            memory.gradients,
            memory.optimizer,
            memory.ema,
            memory.activations,
            memory.buffers,
            memory.peak,
        )
        lines.append(
            f"{layout.pipe:>4} {layout.tensor:>6} {layout.expert:>6} {layout.data:>5} {layout.zero:>4}"
            f" {layout.micro_batch:>5} {'yes' if plan.workload.recompute else 'no':>9} |"
            + "".join(f"{part / GIB:>8.2f}" for part in parts)
            + ("    " if machine.fits(memory) else "  !  ")
            + f" | {plan.bubble:>6.1%} {plan.step_seconds:>7.3f} {plan.images_per_second:>9,.0f} {plan.mfu:>6.1%}"
        )
    return lines


def explanation(plan: Plan, machine: Machine) -> list[str]:
    """Why a plan's axes are as they are, what it sends, and how to ask for it."""
    layout, memory, gpu = plan.layout, plan.memory, machine.gpu
    longest = sorted(plan.seconds.items(), key=lambda part: -part[1])
    sent = [f"  {kind:<15}{payload / GIB:>10.3f} GiB" for kind, payload in plan.traffic.most_common()]
    return [
        f"The best: {plan.images_per_second:,.0f} images/s, {plan.step_seconds:.3f} s a step, MFU {plan.mfu:.1%}",
        f"  {_why_pipe(plan)}",
        f"  {_why_expert(plan, machine)}",
        f"  {_why_zero(layout)}",
        f"  {_why_micro_batch(plan)}",
        f"  memory: {memory.peak / GIB:.1f} of {gpu.memory_gib:g} GiB on a rank of stage {plan.stage}",
        "  time: " + ", ".join(f"{name} {part:.3f} s" for name, part in longest if part >= 0.0005),
        "Sent by a rank in one step (payloads):",
        *(sent or ["  nothing"]),
        "To use it, put after the configuration:",
        "  " + " ".join(plan.overrides()),
        "All figures are estimates; none was measured on a GPU.",
    ]


def _why_pipe(plan: Plan) -> str:
    layout = plan.layout
    if layout.pipe == 1:
        return "pipe 1: the network fits without stages, and stages would wait for one another"
    return f"pipe {layout.pipe}: stages hold a part of the blocks each; {plan.bubble:.1%} of the time is bubble"


def _why_expert(plan: Plan, machine: Machine) -> str:
    layout = plan.layout
    if layout.expert == 1:
        return "expert 1: every rank holds all experts, so no token travels"
    crossed = any(spread.machines > 1 for spread in spreads(layout, "expert", machine.gpu.gpus_per_node))
    where = "also between machines" if crossed else "within a machine"
    return f"expert {layout.expert}: experts are dealt out, which saves their memory; tokens travel {where}"


def _why_zero(layout: Layout) -> str:
    words = {
        0: "nothing is sharded, which sends least",
        1: "the optimiser and the EMA are sharded; gradients are averaged once a step",
        2: "gradients are sharded too, and averaged in every micro-step",
        3: "weights are sharded too, and gathered for each pass",
    }
    return f"ZeRO {layout.zero} over {layout.data} data ranks: {words[layout.zero]}"


def _why_micro_batch(plan: Plan) -> str:
    layout = plan.layout
    text = f"micro-batch {layout.micro_batch}, {layout.accumulation} of them a step"
    if plan.workload.recompute:
        return f"{text}; blocks are computed again in the backward pass, because their activations do not fit"
    return f"{text}; activations are kept, so nothing is computed twice"


def as_json(plan: Plan, machine: Machine) -> dict[str, Any]:
    """A plan as plain data."""
    return {
        "layout": vars(plan.layout),
        "activation_checkpointing": plan.workload.recompute,
        "fits": machine.fits(plan.memory),
        "memory_bytes": vars(plan.memory),
        "sent_bytes": dict(plan.traffic),
        "bubble": plan.bubble,
        "seconds": plan.seconds,
        "step_seconds": plan.step_seconds,
        "images_per_second": plan.images_per_second,
        "mfu": plan.mfu,
        "overrides": plan.overrides(),
    }
