"""A plan in words: what its axes are for, what it needs and sends, and what holds it up."""

from ditmoe.parallel.layout import Layout
from ditmoe.parallel.planner.estimate import Machine, Plan
from ditmoe.parallel.planner.links import spreads

GIB = 2**30


def table(rows: list[Plan], machine: Machine) -> list[str]:
    """A line of figures for each plan, under their names."""
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
    """Why a plan's axes are as they are, what limits it, and what it sends."""
    layout, memory, gpu = plan.layout, plan.memory, machine.gpu
    sent = [f"  {kind:<15}{payload / GIB:>10.3f} GiB" for kind, payload in plan.traffic.most_common()]
    return [
        f"The best: {plan.images_per_second:,.0f} images/s, {plan.step_seconds:.3f} s a step, MFU {plan.mfu:.1%}",
        f"  {_why_pipe(plan)}",
        f"  {_why_expert(plan, machine)}",
        f"  {_why_zero(layout)}",
        f"  {_why_micro_batch(plan)}",
        f"  memory: {memory.peak / GIB:.1f} of {gpu.memory_gib:g} GiB on a rank of stage {plan.stage}",
        f"  limited by {limit(plan)}",
        f"  time: {times(plan)}",
        *_without_exchange(plan),
        "Sent by a rank in one step (payloads):",
        *(sent or ["  nothing"]),
    ]


def limit(plan: Plan) -> str:
    """What a plan's step waits for most."""
    part, share = plan.limit
    what = f"compute ({plan.pace})" if part == "compute" else part
    return f"{what}, {share:.0%} of the step"


def times(plan: Plan) -> str:
    """The parts of a step that take any time to speak of, the longest first."""
    longest = sorted(plan.seconds.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {part:.3f} s" for name, part in longest if part >= 0.0005)


def _without_exchange(plan: Plan) -> list[str]:
    """What could be gained at most, if tokens travelled while something else is computed."""
    if plan.layout.expert == 1:
        return []
    least = plan.least_seconds
    return [f"  if compute hid all that it can of the all-to-all, of which it hides nothing: {least:.3f} s a step"]


def _why_pipe(plan: Plan) -> str:
    layout = plan.layout
    if layout.pipe == 1:
        return "pipe 1: the network fits without stages, and stages would wait for one another"
    return f"pipe {layout.pipe}: each stage holds a part of the blocks; {plan.bubble:.1%} of the time is bubble"


def _why_expert(plan: Plan, machine: Machine) -> str:
    layout = plan.layout
    if layout.expert == 1:
        return "expert 1: every rank holds all experts, so no token travels"
    crossed = any(spread.machines > 1 for spread in spreads(layout, "expert", machine.gpu.gpus_per_node))
    travel = "tokens also travel between machines" if crossed else "tokens travel within a machine"
    return f"expert {layout.expert}: ranks divide the experts, which saves memory; {travel}"


def _why_zero(layout: Layout) -> str:
    words = {
        0: "nothing is sharded, which sends the least",
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
