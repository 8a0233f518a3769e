"""`ditmoe plan --dry-run`: one rank's step under fake tensors, beside what the planner expects of it."""

import json
from typing import Any

from ditmoe.launcher.configuration.resolve import layout_of, resolve
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.planning.workload import workload_of
from ditmoe.model.errors import UserError
from ditmoe.parallel.planner.dry_run import DryRun, dry_run
from ditmoe.parallel.planner.memory import RankMemory, rank_memory
from ditmoe.parallel.planner.traffic import step_traffic
from ditmoe.parallel.stages import stage_blocks

GIB = 2**30


def dry_run_report(config: RunConfig, processes: int, rank: int, imbalance: float, as_json: bool) -> str:
    """Run a rank of the configuration's layout and print both figures of each part.

    Args:
        config: with a complete model.
        processes: of the whole run.

    Raises:
        UserError: the layout cannot run on so many processes, or has no such rank or imbalance.
    """
    resolved = resolve(config, None, processes)
    layout = layout_of(resolved)
    if rank >= layout.processes:
        raise UserError(f"--rank {rank}: expected 0 to {layout.processes - 1}")
    if imbalance > layout.expert:
        raise UserError(
            f"--imbalance {imbalance:g}: expected at most parallel.expert = {layout.expert}, one rank getting all"
        )
    work = workload_of(resolved, imbalance=imbalance)
    found = dry_run(resolved.model, resolved.objective, layout, work, rank)
    expected = rank_memory(resolved.model, layout, found.blocks, found.stage, work)
    traffic = step_traffic(resolved.model, layout, found.blocks, work)
    if as_json:
        return json.dumps(_plain(found, expected, traffic), indent=1)
    experts = resolved.model.experts
    held = layout.expert_slice(rank, experts) if experts else range(0)
    lines = [
        layout.picture(experts, stage_blocks(resolved.model, layout.pipe)).splitlines()[0],
        f"rank {rank}: stage {found.stage}, blocks {found.blocks[0]} to {found.blocks[-1]}"
        + (f", experts {held[0]} to {held[-1]} of each" if experts else "")
        + f"; {found.parameters:,} parameters before ZeRO shards them",
        "",
        f"{'memory, GiB':<16}{'dry run':>12}{'planner':>12}",
        *(
            f"{name:<16}{getattr(found.memory, key) / GIB:>12.3f}{getattr(expected, key) / GIB:>12.3f}"
            for name, key in _ROWS
        ),
        "",
        f"{'sent, GiB':<16}{'dry run':>12}{'planner':>12}",
        *(
            f"{kind:<16}{found.sent[kind] / GIB:>12.3f}{traffic[kind] / GIB:>12.3f}"
            for kind in sorted({*found.sent, *traffic})
        ),
        "",
        f"a step of this rank, run in {found.seconds:.1f} s without its memory",
    ]
    return "\n".join(lines)


_ROWS = (
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("optimiser", "optimizer"),
    ("EMA", "ema"),
    ("peak", "peak"),
)


def _plain(found: DryRun, expected: RankMemory, traffic: dict[str, int]) -> dict[str, Any]:
    return {
        "rank": found.rank,
        "stage": found.stage,
        "blocks": [found.blocks[0], found.blocks[-1]],
        "parameters": found.parameters,
        "memory_bytes": vars(found.memory),
        "sent_bytes": dict(found.sent),
        "seconds": found.seconds,
        "planner": {"memory_bytes": vars(expected), "sent_bytes": dict(traffic)},
    }
